"""The four toys of the synthetic set as signed distance functions with colours: car, duck, house, mug.

World units, z up, the front looks along +x, +y is the left side; everything lies inside a sphere of radius 0.95.
Points are a tensor (3, P). A toy is a list of parts, solids whose union is the object, and of decals, volumes that
only paint the surface inside them. Distances may be under-estimates (ellipsoids), so they are safe to march along.
Every class has a plain toy and endlessly many others, which differ in proportions, colours and features (`Look`).
Formulas: Inigo Quilez, "Distance functions", https://iquilezles.org/articles/distfunctions/.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

Colour = tuple[float, float, float]  # red, green, blue in [0, 1]
Vector = tuple[float, float, float]
Distance = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Painted:
    """A solid or a decal: signed distance of points (3, P) -> (P,), and its colour in [0, 1]."""

    distance: Distance
    colour: Colour


@dataclass(frozen=True)
class Toy:
    """One object; `stretch` scales its axes (at most 1, so that it stays inside its bounding sphere)."""

    name: str
    parts: list[Painted]
    decals: list[Painted] = field(default_factory=list)
    stretch: Vector = (1.0, 1.0, 1.0)

    def distance(self, points: Tensor) -> Tensor:
        """Distance (P,) of points (3, P) to the surface, negative inside; never more than the true one."""
        local = self._to_local(points)
        return reduce(torch.minimum, (part.distance(local) for part in self.parts)) * min(self.stretch)

    def colour(self, points: Tensor) -> Tensor:
        """Colour (3, P) in [0, 1] of surface points (3, P): the nearest part's, painted over by decals in order."""
        local = self._to_local(points)
        nearest = torch.stack([part.distance(local) for part in self.parts]).argmin(dim=0)
        colours = torch.tensor([part.colour for part in self.parts]).T[:, nearest]
        for decal in self.decals:
            paint = torch.tensor(decal.colour)[:, None]
            colours = torch.where(decal.distance(local) < 0, paint, colours)
        return colours

    def _to_local(self, points: Tensor) -> Tensor:
        return points if self.stretch == (1.0, 1.0, 1.0) else points / torch.tensor(self.stretch)[:, None]


def _length(*parts: Tensor) -> Tensor:
    total = parts[0].square()
    for part in parts[1:]:
        total = torch.addcmul(total, part, part)
    return total.sqrt()


def _corner(*faces: Tensor) -> Tensor:
    """Signed distance to the convex corner where faces meet at right angles, from the distance to each of them."""
    return _length(*(face.clamp(min=0) for face in faces)) + reduce(torch.maximum, faces).clamp(max=0)


def _from_axis(p: Tensor, centre: Vector, axis: int) -> Tensor:
    """Distance to the line through `centre` along coordinate axis `axis`."""
    return _length(*(p[other] - centre[other] for other in range(3) if other != axis))


def sphere(centre: Vector, radius: float) -> Distance:
    """Ball."""
    return lambda p: _length(p[0] - centre[0], p[1] - centre[1], p[2] - centre[2]) - radius


def ellipsoid(centre: Vector, radii: Vector, tilt: float = 0.0) -> Distance:
    """Axis-aligned ellipsoid, turned by `tilt` degrees about y (its +x end goes up)."""
    cosine, sine = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))

    def distance(p: Tensor) -> Tensor:
        x, y, z = p[0] - centre[0], p[1] - centre[1], p[2] - centre[2]
        if tilt:
            x, z = cosine * x + sine * z, cosine * z - sine * x
        scaled = _length(x / radii[0], y / radii[1], z / radii[2])
        gradient = _length(x / radii[0] ** 2, y / radii[1] ** 2, z / radii[2] ** 2)
        return scaled * (scaled - 1) / gradient.clamp(min=1e-6)

    return distance


def box(centre: Vector, half: Vector, rounding: float = 0.0) -> Distance:
    """Box with half sides `half`, edges rounded by `rounding` (inside those sides)."""

    def distance(p: Tensor) -> Tensor:
        faces = ((p[axis] - centre[axis]).abs() - (half[axis] - rounding) for axis in range(3))
        return _corner(*faces) - rounding

    return distance


def cylinder(centre: Vector, radius: float, half_length: float, axis: int = 2, rounding: float = 0.0) -> Distance:
    """Cylinder along coordinate axis `axis`."""

    def distance(p: Tensor) -> Tensor:
        across = _from_axis(p, centre, axis) - (radius - rounding)
        along = (p[axis] - centre[axis]).abs() - (half_length - rounding)
        return _corner(across, along) - rounding

    return distance


def torus(centre: Vector, ring: float, tube: float, axis: int = 2) -> Distance:
    """Torus around coordinate axis `axis`."""
    return lambda p: _length(_from_axis(p, centre, axis) - ring, p[axis] - centre[axis]) - tube


def gable(low: float, high: float, half_width: float, half_length: float) -> Distance:
    """Gable roof with its ridge along y at z = `high` and its eaves at x = +-half_width, z = `low`."""
    slope = math.hypot(high - low, half_width)
    normal_x, normal_z = (high - low) / slope, half_width / slope

    def distance(p: Tensor) -> Tensor:
        side = normal_x * p[0].abs() + normal_z * (p[2] - high)
        return torch.maximum(torch.maximum(side, low - p[2]), p[1].abs() - half_length)

    return distance


def smooth_union(first: Distance, second: Distance, blend: float) -> Distance:
    """Union with a fillet of size `blend`."""

    def distance(p: Tensor) -> Tensor:
        a, b = first(p), second(p)
        overlap = (blend - (a - b).abs()).clamp(min=0)
        return torch.minimum(a, b) - overlap.square() / (4 * blend)

    return distance


def subtract(solid: Distance, hole: Distance) -> Distance:
    """`solid` without `hole`."""
    return lambda p: torch.maximum(solid(p), -hole(p))


def intersect(*solids: Distance) -> Distance:
    """What all `solids` share."""
    return lambda p: reduce(torch.maximum, (solid(p) for solid in solids))


def mirror(solid: Distance, *axes: int) -> Distance:
    """`solid`, given where these coordinates are positive, and its mirror images."""
    return lambda p: solid(torch.stack([p[axis].abs() if axis in axes else p[axis] for axis in range(3)]))


def beyond(axis: int, limit: float, sign: int = 1) -> Distance:
    """Half space sign * p[axis] > sign * limit."""
    return lambda p: sign * (limit - p[axis])


BLACK: Colour = (0.10, 0.10, 0.12)
WHITE: Colour = (0.97, 0.96, 0.93)


@dataclass(frozen=True)
class Look:
    """What individuals of a class differ by: choices of `random`, or everywhere the plain one where it is None."""

    random: np.random.Generator | None = None

    def number(self, plain: float, low: float, high: float) -> float:
        """A size or place in [low, high]."""
        return plain if self.random is None else self.random.uniform(low, high)

    def has(self, plain: bool, share: float) -> bool:
        """Whether there is a feature that this share of the individuals has."""
        return plain if self.random is None else bool(self.random.random() < share)

    def hue(self, plain: Colour, lightness: float, saturation: float = 0.85) -> Colour:
        """Any hue, of about this lightness and saturation."""
        if self.random is None:
            return plain
        hue, lighter, duller = self.random.uniform((0, -0.08, -0.15), (1, 0.08, 0.05)).tolist()
        return colorsys.hls_to_rgb(hue, lightness + lighter, saturation + duller)

    def blend(self, plain: Colour, *others: Colour) -> Colour:
        """Somewhere on the way from the plain colour along the others."""
        if self.random is None:
            return plain
        colours, place = np.array((plain, *others)), self.random.uniform(0, len(others))
        red, green, blue = (np.interp(place, range(len(colours)), channel) for channel in colours.T)
        return float(red), float(green), float(blue)


PLAIN = Look()


def build_car(look: Look = PLAIN) -> Toy:
    """Blue car: yellow lamps and grille in front, red lamps behind, white disc left, orange stripe right."""
    glass: Colour = (0.12, 0.15, 0.22)
    length, width, height = look.number(0.76, 0.66, 0.80), look.number(0.36, 0.30, 0.40), look.number(0.17, 0.13, 0.21)
    middle, deck = height - 0.33, 2 * height - 0.33  # heights z of the body's centre and of its top
    top = deck + look.number(0.31, 0.24, 0.40)
    rear, nose = look.number(0.22, 0.06, 0.44) - length, length - look.number(0.42, 0.22, 0.56)  # of the cabin
    cabin, half_cabin = (nose + rear) / 2, (nose - rear) / 2
    pane, half_pane, unit = (deck + top) / 2 - 0.02, (top - deck) / 2 - 0.07, half_cabin / 0.44
    wheel = look.number(0.19, 0.16, 0.22)
    axle = (length - 0.31, width - 0.03, wheel - 0.50)
    body = smooth_union(
        box((0.0, 0.0, middle), (length, width, height), 0.09),
        box((cabin, 0.0, top / 2 - 0.08), (half_cabin, width - 0.06, top / 2 + 0.08), 0.12),
        0.08,
    )
    stripe = look.hue((1.0, 0.55, 0.08), 0.6)
    parts = [
        Painted(body, look.hue((0.14, 0.46, 0.95), 0.5)),
        Painted(mirror(cylinder(axle, wheel, 0.08, axis=1, rounding=0.03), 0, 1), BLACK),
    ]
    if look.has(False, 0.4):
        spoiler = smooth_union(
            box((0.08 - length, 0.0, deck + 0.14), (0.07, width - 0.02, 0.025), 0.02),
            mirror(box((0.08 - length, 0.6 * width, deck + 0.05), (0.03, 0.025, 0.08)), 1),
            0.04,
        )
        parts.append(Painted(spoiler, stripe))
    if look.has(False, 0.35):
        luggage = box((cabin, 0.0, top + 0.07), (0.7 * half_cabin, width - 0.13, 0.06), 0.03)
        bars = mirror(box((cabin + 0.35 * half_cabin, 0.0, top + 0.02), (0.02, width - 0.09, 0.04)), 0)
        parts += [Painted(luggage, look.hue(WHITE, 0.45, 0.6)), Painted(bars, BLACK)]
    decals = []
    if look.has(False, 0.4):
        decals.append(Painted(box((0.0, 0.0, deck), (1.0, 0.25 * width, 1.0)), look.blend(WHITE, stripe)))
    decals += [
        Painted(mirror(box((rear + 0.52 * unit, width, pane), (0.13 * unit, 0.16, half_pane), 0.03), 1), glass),
        Painted(mirror(box((rear + 0.23 * unit, width, pane), (0.11 * unit, 0.16, half_pane), 0.03), 1), glass),
        Painted(box((nose + 0.08, 0.0, pane + 0.005), (0.20, width - 0.12, half_pane + 0.015), 0.03), glass),
        Painted(box((rear - 0.04, 0.0, pane + 0.015), (0.14, width - 0.14, half_pane - 0.01), 0.03), glass),
        Painted(mirror(sphere((length - 0.02, width - 0.12, middle + 0.04), 0.095), 1), (1.0, 0.86, 0.25)),
        Painted(box((length, 0.0, middle - 0.01), (0.06, 0.12, 0.06)), BLACK),
        Painted(mirror(box((-length, width - 0.11, middle + 0.04), (0.08, 0.08, 0.07)), 1), (0.90, 0.10, 0.10)),
        Painted(box((-length, 0.0, middle - 0.03), (0.06, 0.13, 0.055)), WHITE),
    ]
    if look.has(True, 0.6):
        decals.append(Painted(cylinder((-0.02, width, middle + 0.03), 0.125, 0.1, axis=1), WHITE))
    if look.has(True, 0.6):
        decals.append(Painted(box((0.0, -width, middle + 0.05), (0.60, 0.1, 0.055)), stripe))
    hub = cylinder((axle[0], width + 0.06, axle[2]), wheel - 0.10, 0.03, axis=1)
    decals.append(Painted(mirror(hub, 0, 1), (0.80, 0.80, 0.82)))
    return Toy("car", parts, decals)


def build_duck(look: Look = PLAIN) -> Toy:
    """Yellow duck: orange beak and eyes in front, raised tail behind, red scarf with its knot on the left."""
    brown: Colour = (0.50, 0.33, 0.18)
    length, width, height = look.number(0.60, 0.52, 0.64), look.number(0.44, 0.36, 0.47), look.number(0.36, 0.30, 0.40)
    middle, back = height - 0.70, 2 * height - 0.70  # heights z of the belly's centre and of its top
    head, radius = look.number(0.36, 0.26, 0.46), look.number(0.34, 0.26, 0.36)
    scale, throat = radius / 0.34, (head - radius + back) / 2 + 0.035
    tail = ellipsoid((-0.06 - 0.52 * length / 0.60, 0.0, middle + 0.24), (0.24, 0.16, 0.12), look.number(-45, -65, -20))
    neck = cylinder((0.21, 0.0, throat), 0.15 * scale, 0.15, rounding=0.05)  # shows where the head is high
    body = smooth_union(ellipsoid((-0.06, 0.0, middle), (length, width, height)), tail, 0.2)
    head_and_body = smooth_union(body, sphere((0.24, 0.0, head), radius), 0.18)
    wing = ellipsoid(
        (-0.12, width - 0.02, middle + 0.06), (0.53 * length, 0.09, 0.53 * height), look.number(-15, -30, 5)
    )
    bill = look.number(1.0, 0.75, 1.1)
    plumage = look.blend((1.0, 0.80, 0.10), (1.0, 0.88, 0.40), (0.98, 0.95, 0.85), (0.80, 0.62, 0.42), brown)
    parts = [
        Painted(smooth_union(head_and_body, neck, 0.02), plumage),
        Painted(mirror(wing, 1), look.blend((0.95, 0.62, 0.05), WHITE, brown, (0.35, 0.42, 0.55))),
        Painted(
            ellipsoid((0.26 + radius, 0.0, head - 0.07 * scale), (0.20 * bill, 0.19 * scale, 0.075 * bill)),
            look.blend((0.98, 0.45, 0.05), (0.95, 0.70, 0.10), (0.80, 0.25, 0.10)),
        ),
        Painted(mirror(sphere((0.24 + 0.23 * scale, 0.17 * scale, head + 0.10 * scale), 0.075 * scale), 1), BLACK),
    ]
    if look.has(True, 0.5):
        ring = 0.255 * scale
        knot = smooth_union(
            sphere((0.22, ring + 0.035, throat - 0.025), 0.10),
            ellipsoid((0.25, ring + 0.145, throat - 0.145), (0.09, 0.06, 0.16)),
            0.06,
        )
        scarf = smooth_union(torus((0.18, 0.0, throat), ring, 0.075), knot, 0.05)
        parts.append(Painted(scarf, look.hue((0.85, 0.12, 0.15), 0.48)))
    if look.has(False, 0.4):
        cap = intersect(sphere((0.24, 0.0, head), radius + 0.035), beyond(2, head + 0.5 * radius))
        brim = torus((0.24, 0.0, head + 0.5 * radius), 0.88 * radius, 0.06)
        parts += [Painted(cap, look.hue(WHITE, 0.5)), Painted(brim, look.hue(WHITE, 0.6))]
    mallard = Painted(sphere((0.24, 0.0, head), radius + 0.01), (0.10, 0.42, 0.28))
    return Toy("duck", parts, [mallard] if look.has(False, 0.15) else [])


def build_house(look: Look = PLAIN) -> Toy:
    """Cream house, red roof: door and two windows in front, one round window on the left, chimney and bush behind."""
    pane: Colour = (0.25, 0.50, 0.80)
    green = look.blend((0.20, 0.55, 0.18), (0.35, 0.60, 0.15), (0.12, 0.40, 0.25))
    depth, width = look.number(0.42, 0.35, 0.44), look.number(0.52, 0.40, 0.54)  # half of them, along x and y
    eaves, ridge = look.number(0.0, -0.08, 0.10), look.number(0.62, 0.46, 0.68)
    across, steep = width / 0.52, ((ridge - eaves) / (depth + 0.11)) / (0.62 / 0.53)
    walls = intersect(
        box((0.0, 0.0, ridge / 2 - 0.43), (depth, width, ridge / 2 + 0.13)),
        gable(ridge - 1.52, ridge - 0.12, 1.16 / steep, 2.0),
    )
    roof = subtract(
        gable(eaves, ridge, depth + 0.11, width + 0.08), gable(ridge - 1.02, ridge - 0.10, 0.76 / steep, 0.8)
    )
    wall_colour = look.hue((0.96, 0.87, 0.68), 0.80, 0.60)
    roof_colour = look.blend((0.80, 0.16, 0.12), (0.85, 0.42, 0.20), (0.45, 0.27, 0.20), (0.30, 0.36, 0.46))
    bush = smooth_union(sphere((-0.46, 0.22, -0.40), 0.20), sphere((-0.44, -0.06, -0.46), 0.14), 0.06)
    parts = [
        Painted(walls, wall_colour),
        Painted(roof, roof_colour),
        Painted(cylinder((0.0, 0.0, -0.59), 0.66, 0.05, rounding=0.03), (0.45, 0.72, 0.28)),
        Painted(bush, green),
    ]
    decals = [
        Painted(box((depth, 0.0, -0.38), (0.03, 0.115 * across, 0.20)), look.hue((0.45, 0.24, 0.10), 0.33)),
        Painted(mirror(box((depth, 0.33 * across, -0.26), (0.03, 0.105 * across, 0.11)), 1), pane),
        Painted(cylinder((0.0, width, -0.18), look.number(0.16, 0.10, 0.18), 0.03, axis=1), pane),
        Painted(box((0.0, -width, -0.22), (0.62 * depth, 0.03, 0.10)), pane),
        Painted(box((0.0, -width, -0.22), (0.025, 0.04, 0.11)), wall_colour),
    ]
    if look.has(True, 0.6):
        chimney = box((-0.24, look.number(-0.28, -0.32, 0.32) * across, ridge - 0.16), (0.09, 0.09, 0.22))
        parts.append(Painted(chimney, look.blend((0.50, 0.30, 0.25), (0.75, 0.70, 0.65))))
    if look.has(False, 0.45):
        parts.append(Painted(sphere((0.50, look.number(0, -0.36, 0.36), -0.45), look.number(0, 0.11, 0.15)), green))
    if look.has(False, 0.45):
        x, z = 0.62 * depth, ridge - 0.28
        parts.append(Painted(box((x, 0.0, z), (0.13, 0.15, 0.13)), wall_colour))
        parts.append(Painted(box((x + 0.02, 0.0, z + 0.14), (0.17, 0.19, 0.03)), roof_colour))
        decals.append(Painted(box((x + 0.13, 0.0, z + 0.02), (0.02, 0.09, 0.07)), pane))
    return Toy("house", parts, decals)


def build_mug(look: Look = PLAIN) -> Toy:
    """Green mug: smiling face in front, orange handle on the left, red heart behind, yellow disc on the right."""
    radius, height = look.number(0.53, 0.42, 0.54), look.number(0.60, 0.44, 0.62)
    across, tall, top, centre_y = radius / 0.53, height / 0.60, height - 0.02, -0.13
    ring, tube = look.number(0.30, 0.20, 0.31) * tall, look.number(0.085, 0.065, 0.10)
    handle = torus((0.0, centre_y + radius + 0.02, -0.02), ring, tube, axis=0)
    front, back = beyond(0, 0.1), beyond(0, -0.1, -1)
    accent = look.hue((0.98, 0.55, 0.10), 0.52)
    spread, mouth = 0.17 * look.number(1, 0.75, 1.2) * across, 0.23 * look.number(1, 0.65, 1.1) * across
    iris = look.number(0.085, 0.06, 0.10) * across

    def eyes(p: Tensor) -> Tensor:
        return _length((p[1] - centre_y).abs() - spread, p[2] - 0.17 * tall) - iris

    def heart(p: Tensor) -> Tensor:
        # The curve (y^2 + z^2 - 1)^3 = y^2 z^3; only the sign of a decal's distance matters.
        y, z = (p[1] - centre_y) / (0.25 * across), (p[2] + 0.02) / (0.25 * across)
        return (y.square() + z.square() - 1).pow(3) - y.square() * z.pow(3)

    smile = intersect(torus((radius - 0.03, centre_y, -0.02), mouth, 0.05, axis=0), beyond(2, -0.10, -1))
    wall = cylinder((0.0, centre_y, -0.02), radius, height, rounding=0.06)
    bowl = cylinder((0.0, centre_y, top), radius - 0.08, 0.24)
    parts = [
        Painted(subtract(wall, bowl), look.hue((0.10, 0.68, 0.48), 0.45, 0.75)),
        Painted(subtract(handle, cylinder((0.0, centre_y, 0.0), radius - 0.07, 1.0)), accent),
    ]
    decals = []
    if look.has(False, 0.4):
        place = look.number(0, -0.80, -0.60) * height
        decals.append(Painted(cylinder((0.0, centre_y, place), 0.6, look.number(0, 0.04, 0.09)), look.hue(WHITE, 0.7)))
    decals += [Painted(intersect(eyes, front), BLACK), Painted(smile, BLACK)]
    if look.has(True, 0.5):
        decals.append(Painted(intersect(heart, back), look.blend((0.92, 0.14, 0.20), (0.98, 0.55, 0.70), WHITE)))
    if look.has(True, 0.5):
        disc = cylinder((0.0, centre_y - radius, -0.02), look.number(0.19, 0.14, 0.24), 0.2, axis=1)
        decals.append(Painted(disc, look.hue((1.0, 0.84, 0.20), 0.62)))
    if look.has(False, 0.3):
        knob = sphere((0.0, centre_y, top + 0.11), 0.085)
        parts.append(Painted(cylinder((0.0, centre_y, top + 0.01), radius - 0.06, 0.05, rounding=0.03), accent))
        parts.append(Painted(knob, look.hue(WHITE, 0.5)))
    else:
        drink = look.blend((0.36, 0.20, 0.10), (0.70, 0.42, 0.15), (0.55, 0.36, 0.25), (0.85, 0.75, 0.62))
        decals.append(Painted(cylinder((0.0, centre_y, top), radius - 0.075, 0.235), (0.97, 0.93, 0.85)))
        decals.append(Painted(cylinder((0.0, centre_y, top - 0.28), radius - 0.075, 0.06), drink))
    return Toy("mug", parts, decals)


BUILDERS = (build_car, build_duck, build_house, build_mug)
CLASS_NAMES = tuple(builder().name for builder in BUILDERS)


def build_toy(class_idx: int, instance: int = 0, seed: int = 0) -> Toy:
    """The toy of class `class_idx`; instance 0 is plain, others are drawn from (seed, instance)."""
    if instance == 0:
        return BUILDERS[class_idx]()
    random = np.random.default_rng([seed, class_idx, instance])
    x, y, z = random.uniform(0.9, 1.0, size=3).tolist()
    return replace(BUILDERS[class_idx](Look(random)), stretch=(x, y, z))
