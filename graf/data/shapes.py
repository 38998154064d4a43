"""The four toys of the synthetic set as signed distance functions with colours: car, duck, house, mug.

World units, z up, the front looks along +x, +y is the left side; everything lies inside a sphere of radius 0.95.
Points are a tensor (3, P). A toy is a list of parts, solids whose union is the object, and of decals, volumes that
only paint the surface inside them. Distances may be under-estimates (ellipsoids), so they are safe to march along.
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


def build_car() -> Toy:
    """Blue car: yellow lamps and grille in front, red lamps behind, white disc left, orange stripe right."""
    blue: Colour = (0.14, 0.46, 0.95)
    glass: Colour = (0.12, 0.15, 0.22)
    body = smooth_union(
        box((0.0, 0.0, -0.16), (0.76, 0.36, 0.17), 0.09), box((-0.10, 0.0, 0.08), (0.44, 0.30, 0.24), 0.12), 0.08
    )
    wheels = mirror(cylinder((0.45, 0.33, -0.31), 0.19, 0.08, axis=1, rounding=0.03), 0, 1)
    return Toy(
        "car",
        [Painted(body, blue), Painted(wheels, BLACK)],
        [
            Painted(mirror(box((-0.02, 0.36, 0.145), (0.13, 0.16, 0.085), 0.03), 1), glass),
            Painted(mirror(box((-0.31, 0.36, 0.145), (0.11, 0.16, 0.085), 0.03), 1), glass),
            Painted(box((0.42, 0.0, 0.15), (0.20, 0.24, 0.10), 0.03), glass),
            Painted(box((-0.58, 0.0, 0.16), (0.14, 0.22, 0.075), 0.03), glass),
            Painted(mirror(sphere((0.74, 0.24, -0.12), 0.095), 1), (1.0, 0.86, 0.25)),
            Painted(box((0.76, 0.0, -0.17), (0.06, 0.12, 0.06)), BLACK),
            Painted(mirror(box((-0.76, 0.25, -0.12), (0.08, 0.08, 0.07)), 1), (0.90, 0.10, 0.10)),
            Painted(box((-0.76, 0.0, -0.19), (0.06, 0.13, 0.055)), WHITE),
            Painted(cylinder((-0.02, 0.36, -0.13), 0.125, 0.1, axis=1), WHITE),
            Painted(box((0.0, -0.36, -0.11), (0.60, 0.1, 0.055)), (1.0, 0.55, 0.08)),
            Painted(mirror(cylinder((0.45, 0.42, -0.31), 0.09, 0.03, axis=1), 0, 1), (0.80, 0.80, 0.82)),
        ],
    )


def build_duck() -> Toy:
    """Yellow duck: orange beak and eyes in front, raised tail behind, red scarf with its knot on the left."""
    yellow: Colour = (1.0, 0.80, 0.10)
    orange: Colour = (0.98, 0.45, 0.05)
    red: Colour = (0.85, 0.12, 0.15)
    head_and_body = smooth_union(
        smooth_union(
            ellipsoid((-0.06, 0.0, -0.34), (0.60, 0.44, 0.36)),
            ellipsoid((-0.58, 0.0, -0.10), (0.24, 0.16, 0.12), -45),
            0.2,
        ),
        sphere((0.24, 0.0, 0.36), 0.34),
        0.18,
    )
    wings = mirror(ellipsoid((-0.12, 0.42, -0.28), (0.32, 0.09, 0.19), -15), 1)
    beak = ellipsoid((0.60, 0.0, 0.29), (0.20, 0.19, 0.075))
    eyes = mirror(sphere((0.47, 0.17, 0.46), 0.075), 1)
    scarf = torus((0.18, 0.0, 0.055), 0.255, 0.075)
    knot = smooth_union(sphere((0.22, 0.29, 0.03), 0.10), ellipsoid((0.25, 0.40, -0.09), (0.09, 0.06, 0.16)), 0.06)
    return Toy(
        "duck",
        [
            Painted(head_and_body, yellow),
            Painted(wings, (0.95, 0.62, 0.05)),
            Painted(beak, orange),
            Painted(eyes, BLACK),
            Painted(smooth_union(scarf, knot, 0.05), red),
        ],
    )


def build_house() -> Toy:
    """Cream house, red roof: door and two windows in front, one round window on the left, chimney and bush behind."""
    cream: Colour = (0.96, 0.87, 0.68)
    red: Colour = (0.80, 0.16, 0.12)
    pane: Colour = (0.25, 0.50, 0.80)
    green: Colour = (0.20, 0.55, 0.18)
    walls = intersect(box((0.0, 0.0, -0.12), (0.42, 0.52, 0.44)), gable(-0.9, 0.50, 1.16, 2.0))
    roof = subtract(gable(0.0, 0.62, 0.53, 0.60), gable(-0.4, 0.52, 0.76, 0.8))
    lawn = cylinder((0.0, 0.0, -0.59), 0.66, 0.05, rounding=0.03)
    chimney = box((-0.24, -0.28, 0.46), (0.09, 0.09, 0.22))
    bush = smooth_union(sphere((-0.46, 0.22, -0.40), 0.20), sphere((-0.44, -0.06, -0.46), 0.14), 0.06)
    return Toy(
        "house",
        [
            Painted(walls, cream),
            Painted(roof, red),
            Painted(lawn, (0.45, 0.72, 0.28)),
            Painted(chimney, (0.50, 0.30, 0.25)),
            Painted(bush, green),
        ],
        [
            Painted(box((0.42, 0.0, -0.38), (0.03, 0.115, 0.20)), (0.45, 0.24, 0.10)),
            Painted(mirror(box((0.42, 0.33, -0.26), (0.03, 0.105, 0.11)), 1), pane),
            Painted(cylinder((0.0, 0.52, -0.18), 0.16, 0.03, axis=1), pane),
            Painted(box((0.0, -0.52, -0.22), (0.26, 0.03, 0.10)), pane),
            Painted(box((0.0, -0.52, -0.22), (0.025, 0.04, 0.11)), cream),
        ],
    )


def build_mug() -> Toy:
    """Green mug: smiling face in front, orange handle on the left, red heart behind, yellow disc on the right."""
    green: Colour = (0.10, 0.68, 0.48)
    wall = cylinder((0.0, -0.13, -0.02), 0.53, 0.60, rounding=0.06)
    bowl = cylinder((0.0, -0.13, 0.58), 0.45, 0.24)
    handle = torus((0.0, 0.42, -0.02), 0.30, 0.085, axis=0)
    centre_y, front, back = -0.13, beyond(0, 0.1), beyond(0, -0.1, -1)

    def eyes(p: Tensor) -> Tensor:
        return _length((p[1] - centre_y).abs() - 0.17, p[2] - 0.17) - 0.085

    def heart(p: Tensor) -> Tensor:
        # The curve (y^2 + z^2 - 1)^3 = y^2 z^3; only the sign of a decal's distance matters.
        y, z = (p[1] - centre_y) / 0.25, (p[2] + 0.02) / 0.25
        return (y.square() + z.square() - 1).pow(3) - y.square() * z.pow(3)

    smile = intersect(torus((0.5, centre_y, -0.02), 0.23, 0.05, axis=0), beyond(2, -0.10, -1))
    return Toy(
        "mug",
        [
            Painted(subtract(wall, bowl), green),
            Painted(subtract(handle, cylinder((0.0, centre_y, 0.0), 0.46, 1.0)), (0.98, 0.55, 0.10)),
        ],
        [
            Painted(intersect(eyes, front), BLACK),
            Painted(smile, BLACK),
            Painted(intersect(heart, back), (0.92, 0.14, 0.20)),
            Painted(cylinder((0.0, -0.66, -0.02), 0.19, 0.2, axis=1), (1.0, 0.84, 0.20)),
            Painted(cylinder((0.0, centre_y, 0.58), 0.455, 0.235), (0.97, 0.93, 0.85)),
            Painted(cylinder((0.0, centre_y, 0.30), 0.455, 0.06), (0.36, 0.20, 0.10)),
        ],
    )


BUILDERS = (build_car, build_duck, build_house, build_mug)
CLASS_NAMES = tuple(builder().name for builder in BUILDERS)


def build_toy(class_idx: int, instance: int = 0, seed: int = 0) -> Toy:
    """The toy of class `class_idx`; instance 0 is plain, others vary hue and proportions by (seed, instance)."""
    toy = BUILDERS[class_idx]()
    if instance == 0:
        return toy
    random = np.random.default_rng([seed, class_idx, instance])
    turn = random.uniform(-0.12, 0.12)
    x, y, z = random.uniform(0.82, 1.0, size=3).tolist()

    def recolour(painted: Painted) -> Painted:
        hue, lightness, saturation = colorsys.rgb_to_hls(*painted.colour)
        return replace(painted, colour=colorsys.hls_to_rgb((hue + turn) % 1, lightness, saturation))

    parts, decals = ([recolour(painted) for painted in group] for group in (toy.parts, toy.decals))
    return replace(toy, parts=parts, decals=decals, stretch=(x, y, z))
