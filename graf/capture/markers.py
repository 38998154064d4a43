"""True cameras of photographs of an object on the marker sheet: markers found, lens measured where unknown, poses.

The world is the sheet's (graf/capture/marker_sheet.py): the same for every photograph and every object on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graf.base.extras import import_optional
from graf.capture.cameras import Lens, Picture, PosedPhotographs, move_world
from graf.capture.errors import CaptureError
from graf.capture.marker_sheet import PAPERS, MarkerSheet, lay_out_markers
from graf.capture.posed import centre_on_object

FEWEST_MARKERS = 3  # of a photograph: two that lie side by side fix the camera's place badly
FEWEST_PHOTOGRAPHS = 4
REFINED_WITHIN = 3  # pixels around a corner; OpenCV before 4.9 does not make that smaller for small markers
MEASURED_ON = 40  # photographs, evenly chosen: what a lens is measured on
GROSS_ERROR = 3.0  # times the usual error of a photograph, and at least two pixels: a marker read wrongly
LARGE_ERROR = 0.006  # of the picture's longer side: a photograph whose markers do not lie on one sheet


@dataclass(frozen=True)
class MarkedPhotographs:
    """Photographs with poses in the world of `sheet` (millimetres); names of those that were lost and why; error in
    pixels (root mean square over all corners).
    """

    photographs: PosedPhotographs
    sheet: MarkerSheet
    lost: dict[str, str]
    error: float

    def report(self) -> list[str]:
        """Lines for a person."""
        found, total = len(self.photographs), len(self.photographs) + len(self.lost)
        lines = [
            f"placed {found} of {total} photographs by their markers, error {self.error:.2f} pixels, field of view "
            f"{self.photographs.lens.fov:.1f} degrees"
        ]
        return lines + [f"lost: {name}: {reason}" for name, reason in self.lost.items()]


Detection = tuple[np.ndarray, np.ndarray]  # corners (n, 3) in millimetres on the sheet and (n, 2) in pixels


def poses_from_markers(
    images: Sequence[Picture],
    masks: Sequence[Picture] | None = None,
    names: Sequence[str] | None = None,
    fov: float | None = None,
) -> MarkedPhotographs:
    """Cameras of photographs uint8 (H, W, 3) of one size by one camera in which the marker sheet is seen.

    fov: degrees across the width of a pinhole camera where it is known; else focal length and distortion are measured
    from the markers, for which they have to be seen from a slant. masks are handed on. Which paper the sheet is
    printed on the markers tell. Raises CaptureError where too few photographs show markers, MissingExtra without
    OpenCV.
    """
    names = list(names or [f"photograph {number}" for number in range(len(images))])
    shape = images[0].shape
    if any(image.shape != shape for image in images):
        raise CaptureError("marker photographs have several sizes; expected one camera with one zoom, all upright")
    markers = [detect_markers(image) for image in images]
    sheet = recognise_sheet(markers)
    detections = [_corners_on(sheet, seen) for seen in markers]
    lost = {
        name: f"{len(seen[1]) // 4} markers seen, expected at least {FEWEST_MARKERS}"
        for name, seen in zip(names, detections, strict=True)
        if len(seen[1]) < 4 * FEWEST_MARKERS
    }
    usable = [number for number, name in enumerate(names) if name not in lost]
    if len(usable) < FEWEST_PHOTOGRAPHS:
        raise CaptureError(
            f"markers are seen in {len(usable)} of {len(images)} photographs; expected at least {FEWEST_PHOTOGRAPHS} "
            f"with {FEWEST_MARKERS} markers each: print the sheet (graf capture --marker-sheet), keep it flat, sharp "
            "and wholly in the picture"
        )
    height, width = shape[:2]
    if fov is None:
        chosen = np.unique(np.linspace(0, len(usable) - 1, MEASURED_ON).round().astype(int))
        lens = measure_lens([detections[usable[place]] for place in chosen], width, height)
    else:
        lens = Lens.from_fov(width, height, fov)
    poses, kept, squares = [], [], []
    for number in usable:
        pose, errors = solve_pose(detections[number], lens)
        rms = float(np.sqrt((errors**2).mean()))
        if rms > LARGE_ERROR * max(width, height):
            lost[names[number]] = (
                f"its markers miss the sheet by {rms:.1f} pixels: a bent sheet, one scaled unevenly, or another fov?"
            )
            continue
        poses.append(pose)
        kept.append(number)
        squares.append(errors**2)
    if len(kept) < FEWEST_PHOTOGRAPHS:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(lost.items())[:3])
        raise CaptureError(f"markers fix the camera of {len(kept)} of {len(images)} photographs ({reasons})")
    photographs = PosedPhotographs(
        [images[number] for number in kept],
        None if masks is None else [masks[number] for number in kept],
        np.stack(poses),
        lens,
        [names[number] for number in kept],
        floor=np.array([0.0, 0.0, 1.0, 0.0]),
    )
    return MarkedPhotographs(photographs, sheet, lost, float(np.sqrt(np.concatenate(squares).mean())))


def centre_on_sheet(marked: MarkedPhotographs, radius: float | None = None) -> PosedPhotographs:
    """The photographs in the world whose unit sphere holds the object; the axes remain the sheet's.

    radius: half of the object's largest diameter in millimetres: the sphere then stands on the cross. Without it the
    masks tell where the object is; without those it is taken to fill the free middle of the sheet.
    """
    if radius is None and marked.photographs.masks is not None:
        return centre_on_object(marked.photographs, level=False)
    radius = radius or min(marked.sheet.free) / 2
    if radius <= 0:
        raise CaptureError(f"radius {radius:g}: expected half of the object's largest diameter, in millimetres")
    return move_world(marked.photographs, np.eye(3), np.array([0.0, 0.0, radius]), radius)


def detect_markers(image: Picture) -> dict[int, np.ndarray]:
    """Corners (4, 2) in pixels, the picture's corner at 0, of the markers in a picture by their numbers."""
    cv2 = import_optional("cv2", "capture")
    parameters = cv2.aruco.DetectorParameters()
    parameters.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_SUBPIX
    parameters.cornerRefinementWinSize = REFINED_WITHIN
    dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    detector = cv2.aruco.ArucoDetector(dictionary, parameters)
    found, numbers, _ = detector.detectMarkers(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    seen = [] if numbers is None else np.asarray(numbers).ravel().tolist()
    return {
        number: np.asarray(corners, np.float64).reshape(4, 2) + 0.5
        for number, corners in zip(seen, found, strict=True)
        if seen.count(number) == 1  # a marker that is seen twice is none
    }


def recognise_sheet(markers: Sequence[dict[int, np.ndarray]]) -> MarkerSheet:
    """The sheet whose markers are seen most often in all photographs."""
    sheets = [lay_out_markers(paper) for paper in PAPERS]
    return max(sheets, key=lambda sheet: sum(len(sheet.corners().keys() & seen.keys()) for seen in markers))


def _corners_on(sheet: MarkerSheet, seen: dict[int, np.ndarray]) -> Detection:
    known = sheet.corners()
    numbers = sorted(known.keys() & seen.keys())
    places = [np.zeros((0, 3)), *(known[number] for number in numbers)]
    return np.concatenate(places), np.concatenate([np.zeros((0, 2)), *(seen[number] for number in numbers)])


def measure_lens(detections: Sequence[Detection], width: int, height: int) -> Lens:
    """Focal length and radial distortion from views of the flat sheet (Zhang, PAMI 2000), the axis in the middle."""
    cv2 = import_optional("cv2", "capture")
    places = [detection[0].astype(np.float32) for detection in detections]
    pixels = [detection[1].astype(np.float32) for detection in detections]
    guess = 1.2 * max(width, height)
    matrix = np.array([[guess, 0, width / 2], [0, guess, height / 2], [0, 0, 1.0]])
    flags = cv2.CALIB_USE_INTRINSIC_GUESS | cv2.CALIB_FIX_PRINCIPAL_POINT | cv2.CALIB_FIX_ASPECT_RATIO
    flags |= cv2.CALIB_ZERO_TANGENT_DIST | cv2.CALIB_FIX_K2 | cv2.CALIB_FIX_K3
    try:
        _, matrix, distortion, *_ = cv2.calibrateCamera(places, pixels, (width, height), matrix, None, flags=flags)
    except cv2.error as error:
        raise CaptureError(f"the lens cannot be measured from these markers ({error}); give --fov") from error
    focal, radial = float(matrix[0, 0]), float(np.ravel(distortion)[0])
    lens = Lens(width, height, focal, (width / 2, height / 2), radial)
    if not 10 < lens.fov < 130:
        raise CaptureError(
            f"measured a field of view of {lens.fov:.0f} degrees from the markers, which no phone has; take the "
            "photographs from a slant (20-60 degrees above the table), or give --fov"
        )
    return lens


def solve_pose(detection: Detection, lens: Lens) -> tuple[np.ndarray, np.ndarray]:
    """Pose (4, 4), camera to sheet, of one photograph, and the errors (n,) in pixels of the corners that were used.

    Of the two poses in which a plane looks nearly the same (Collins & Bartoli, "IPPE", IJCV 2014) the better one after
    refinement; a marker that is far off is left out.
    """
    cv2 = import_optional("cv2", "capture")
    places, pixels = detection
    matrix = np.array([[lens.focal, 0, lens.centre[0]], [0, lens.focal, lens.centre[1]], [0, 0, 1.0]])
    distortion = np.array([lens.radial, 0, 0, 0])

    def solve(used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answers = cv2.solvePnPGeneric(places[used], pixels[used], matrix, distortion, flags=cv2.SOLVEPNP_IPPE)
        solutions = []
        for turn, shift in zip(answers[1], answers[2], strict=True):
            refined = cv2.solvePnPRefineLM(places[used], pixels[used], matrix, distortion, turn, shift)
            pose = np.eye(4)
            rotation = cv2.Rodrigues(refined[0])[0]
            pose[:3, :3] = rotation.T @ np.diag([1.0, -1.0, -1.0])
            pose[:3, 3] = -rotation.T @ np.ravel(refined[1])
            errors = np.linalg.norm(lens.project((places - pose[:3, 3]) @ pose[:3, :3]) - pixels, axis=1)
            solutions.append((float(np.median(errors)), pose, np.nan_to_num(errors, nan=np.inf)))
        _, pose, errors = min(solutions, key=lambda solution: solution[0])
        return pose, errors

    everything = np.ones(len(places), bool)
    pose, errors = solve(everything)
    by_marker = errors.reshape(-1, 4).max(axis=1)
    good = np.repeat(by_marker <= max(2.0, GROSS_ERROR * float(np.median(by_marker))), 4)
    if not good.all() and good.sum() >= 4 * FEWEST_MARKERS:
        pose, errors = solve(good)
    return pose, errors[good] if good.sum() >= 4 * FEWEST_MARKERS else errors
