"""The sheet of markers that an object stands on: where each lies on the paper, and the sheet as PDF in true size.

The sheet's world is in millimetres: the origin in the middle of the page, x to the right and y to the top of the page,
z out of the paper. Markers: ArUco (Garrido-Jurado et al., Pattern Recognition 2014), dictionary DICT_4X4_50.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from graf.base.extras import import_optional
from graf.base.files import write_atomically
from graf.capture.errors import CaptureError

PAPERS = {"a4": (210.0, 297.0), "letter": (215.9, 279.4)}  # width and height in millimetres
FIRST_NUMBERS = {"a4": 0, "letter": 24}  # of their markers, all different: a photograph tells which paper it shows
MARKER = 24.0  # millimetres along the side of a marker
GAP = 8.0  # between two markers, at least: they need white around them
EDGE = 10.0  # of the page that printers leave blank
CELLS = 6  # along the side of a marker with its black border
BAR = 100.0  # millimetres, to measure on the print
POINT = 72 / 25.4  # PDF's unit, per millimetre


@dataclass(frozen=True)
class Marker:
    """A square marker by its number and its lower left corner in millimetres on the sheet."""

    number: int
    left: float
    bottom: float

    @property
    def corners(self) -> np.ndarray:
        """(4, 3) in millimetres, in the order in which ArUco names them: clockwise from the upper left."""
        right, top = self.left + MARKER, self.bottom + MARKER
        return np.array([(self.left, top, 0), (right, top, 0), (right, self.bottom, 0), (self.left, self.bottom, 0)])


@dataclass(frozen=True)
class MarkerSheet:
    """A page of `width` x `height` millimetres with markers all around a free middle."""

    paper: str
    width: float
    height: float
    markers: tuple[Marker, ...]

    @property
    def free(self) -> tuple[float, float]:
        """Width and height in millimetres of the middle, where the object stands."""
        inset = 2 * (EDGE + MARKER)
        return self.width - inset, self.height - inset

    def corners(self) -> dict[int, np.ndarray]:
        """Corners (4, 3) of every marker by its number."""
        return {marker.number: marker.corners for marker in self.markers}


@cache
def lay_out_markers(paper: str) -> MarkerSheet:
    """The sheet for a paper: "a4" or "letter". Raises CaptureError for any other."""
    if paper not in PAPERS:
        raise CaptureError(f"paper {paper!r}: expected {' or '.join(PAPERS)}")
    width, height = PAPERS[paper]
    columns, rows = (_spread(side - 2 * EDGE) for side in (width, height))
    # From the upper left corner clockwise.
    ring = [(x, rows[-1]) for x in columns] + [(columns[-1], y) for y in rows[-2:0:-1]]
    ring += [(x, rows[0]) for x in columns[::-1]] + [(columns[0], y) for y in rows[1:-1]]
    return MarkerSheet(
        paper, width, height, tuple(Marker(number, x, y) for number, (x, y) in enumerate(ring, FIRST_NUMBERS[paper]))
    )


def _spread(length: float) -> list[float]:
    """Where markers begin along `length` millimetres around 0, as many as fit, from one end to the other."""
    count = int((length + GAP) // (MARKER + GAP))
    return (np.linspace(0, length - MARKER, count) - length / 2).tolist()


def marker_cells(number: int) -> np.ndarray:
    """Which of the 6 x 6 cells of a marker are black, bool, from the upper left."""
    cv2 = import_optional("cv2", "capture")
    dictionary = cv2.aruco.getPredefinedDictionary(cv2.aruco.DICT_4X4_50)
    return np.asarray(cv2.aruco.generateImageMarker(dictionary, number, CELLS)) == 0


def black_rectangles(sheet: MarkerSheet) -> list[list[tuple[float, float, float, float]]]:
    """For every marker its black parts (left, bottom, width, height) in millimetres: runs of cells in each row."""
    cell = MARKER / CELLS
    rectangles = []
    for marker in sheet.markers:
        parts = []
        for row, black in enumerate(marker_cells(marker.number)):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], black, [0]])))
            for start, stop in edges.reshape(-1, 2).tolist():
                bottom = marker.bottom + (CELLS - 1 - row) * cell
                parts.append((marker.left + start * cell, bottom, (stop - start) * cell, cell))
        rectangles.append(parts)
    return rectangles


def draw_marker_sheet(sheet: MarkerSheet, dots_per_millimetre: float) -> np.ndarray:
    """The sheet as a picture uint8 (H, W), white paper, without the words: what a camera sees of it."""
    height, width = (round(side * dots_per_millimetre) for side in (sheet.height, sheet.width))
    picture = np.full((height, width), 255, np.uint8)
    for parts in black_rectangles(sheet):
        for left, bottom, across, up in parts:
            x = np.round((np.array([left, left + across]) + sheet.width / 2) * dots_per_millimetre).astype(int)
            y = np.round((sheet.height / 2 - np.array([bottom + up, bottom])) * dots_per_millimetre).astype(int)
            picture[y[0] : y[1], x[0] : x[1]] = 0
    return picture


def write_marker_sheet(path: Path, paper: str = "a4") -> MarkerSheet:
    """Write the sheet as a PDF of one page, drawn in lines and so exact at any resolution. Raises CaptureError."""
    sheet = lay_out_markers(paper)
    if path.suffix.lower() != ".pdf":
        raise CaptureError(f"{path}: the marker sheet is a PDF; name it {path.with_suffix('.pdf').name}")
    drawing = [
        f"1 0 0 1 {sheet.width / 2 * POINT:.4f} {sheet.height / 2 * POINT:.4f} cm",
        f"{POINT:.6f} 0 0 {POINT:.6f} 0 0 cm",
    ]
    for parts in black_rectangles(sheet):  # one path for each marker: no hairlines between its cells
        drawing += [f"{x:.4f} {y:.4f} {w:.4f} {h:.4f} re" for x, y, w, h in parts] + ["f"]
    drawing += _draw_middle(sheet)
    write_atomically(path, _pdf(sheet, "\n".join(drawing)))
    return sheet


def _draw_middle(sheet: MarkerSheet) -> list[str]:
    """A cross where the object's middle goes, the bar to measure, and what to do, in light grey and small print."""
    free_width, free_height = sheet.free
    bottom = -free_height / 2 + 8
    lines = ["0.75 G 0.2 w", "-6 0 m 6 0 l S", "0 -6 m 0 6 l S", "0 G 0 g"]
    lines += [f"{-BAR / 2:.4f} {bottom:.4f} {BAR:.4f} 0.8 re f"]
    for end in (-BAR / 2, BAR / 2 - 0.4):
        lines.append(f"{end:.4f} {bottom - 1.2:.4f} 0.4 3.2 re f")
    words = (
        (bottom + 6, f'this bar is {BAR:.0f} mm long in a print at 100 % ("actual size")'),
        (free_height / 2 - 8, "put the object on the cross and leave it there; keep the sheet flat,"),
        (free_height / 2 - 12, "all of it in the picture, and markers on at least two sides in sight"),
    )
    for height, text in words:
        escaped = text.replace("(", r"\(").replace(")", r"\)")
        lines.append(f"BT /F1 3 Tf {-free_width / 2 + 8:.4f} {height:.4f} Td ({escaped}) Tj ET")
    return lines


def _pdf(sheet: MarkerSheet, drawing: str) -> bytes:
    """A PDF 1.4 of one page with this content stream (ISO 32000-1, 7.5)."""
    box = f"[0 0 {sheet.width * POINT:.4f} {sheet.height * POINT:.4f}]"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R /ViewerPreferences << /PrintScaling /None >> >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    document, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(document))
        document += f"{number} 0 obj\n{content}\nendobj\n".encode("ascii")
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    size = len(objects) + 1
    table = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\n"
    return document + f"{table}startxref\n{len(document)}\n%%EOF\n".encode("ascii")
