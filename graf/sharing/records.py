"""What a run's own files say of a generator: scores of exactly these weights, and the memory and time of training.

It reads scores.jsonl, metrics.jsonl and eval/, and adds nothing to what stands there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graf.evaluation.fidelity import read_scores
from graf.runtime.logs import METRICS_FILE, warn_once

#: the files that are handed on with a model: they are what the scores are taken from
SCORE_FILES = ("scores.jsonl", "eval/scores.jsonl", "eval/heldout.json", "eval/consistency.json")

_SCORE = re.compile(r"(?:(?:sr|bicubic)_)?(?:fid|kid|precision|recall|psnr|ssim)(?:_offline|_validation)?")
_PEAK = re.compile(r"memory_(?:(?P<phase>.+?)_)?(?P<kind>live_peak|peak_rss|peak_reserved|peak)")
#: how a peak of memory is measured, by the ending of its name in metrics.jsonl
PEAKS = {
    "peak_rss": "resident memory of the process",
    "live_peak": "tensors alive at once",
    "peak": "memory that the device's allocator gave to tensors",
    "peak_reserved": "memory that the device's allocator had reserved",
}


@dataclass(frozen=True)
class Measurement:
    """One score: its name as in the run's files, its value, the split that it was measured on, and how.

    provenance: plain values, as counts, extractor and seed.
    """

    name: str
    value: float
    split: str
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Resources:
    """What training took: minutes of training steps up to the weights, and the largest peaks of memory.

    minutes: from the rate of each logged line, so without sampling and scoring; None where none is logged. peaks: key
    of PEAKS -> (MiB, the phase of a step that needed it; "" where it is that of the whole program).
    """

    minutes: float | None
    peaks: dict[str, tuple[float, str]]


def read_measurements(folder: Path, iteration: int) -> list[Measurement]:
    """The scores in a run folder that were measured on the weights of `iteration`, the latest one of each kind."""
    found: dict[tuple[str, str], Measurement] = {}
    for name in ("scores.jsonl", "eval/scores.jsonl"):
        if (folder / name).is_file():
            for row in read_scores(folder / name):
                if row.get("iteration") == iteration:
                    found |= {(score.name, score.split): score for score in _read_row(row)}
    heldout = _read_json(folder / "eval" / "heldout.json")
    if heldout is not None:
        found |= {(score.name, score.split): score for score in _read_heldout(heldout, iteration)}
    return list(found.values())


def _read_row(row: Mapping[str, Any]) -> list[Measurement]:
    """The scores of one row of scores.jsonl; what else stands in it is their provenance."""
    scores = []
    for name in row:
        if _SCORE.fullmatch(name) and _is_finite(row[name]):
            split = "validation" if name.endswith("_validation") else "train"
            scores.append(Measurement(name, float(row[name]), split, _provenance_of(name, row)))
    return scores


def _provenance_of(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of how one of its scores was measured."""
    if name.endswith("_validation"):  # the photographs' own cameras: nothing is drawn, no features are taken
        return {key: row[key] for key in ("iteration", "resolution", "ema") if key in row}
    others = {key: value for key, value in row.items() if not _SCORE.fullmatch(key)}
    return {key: value for key, value in others.items() if "kid" not in key or "kid" in name}


def _read_heldout(report: Mapping[str, Any], iteration: int) -> list[Measurement]:
    """PSNR and SSIM of the test split out of what `graf eval --heldout` wrote, of these weights alone.

    That training may have seen its photographs is part of their provenance.
    """
    renders, objects = report.get("renders"), report.get("objects")
    if not isinstance(renders, Mapping) or renders.get("iteration") != iteration or not isinstance(objects, list):
        return []
    average = next((row for row in objects if isinstance(row, Mapping) and row.get("name") == "average"), {})
    provenance = {
        "photographs": average.get("photographs"),
        "iteration": iteration,
        "resolution": renders["resolution"],
    }
    if report.get("never_seen") is False:
        provenance["caution"] = "training may have seen these photographs"
    values = {"psnr": average.get("labelled"), "ssim": average.get("ssim")}
    return [
        Measurement(name, float(value), "test", provenance)
        for name, value in values.items()
        if value is not None and _is_finite(value)
    ]


def read_resources(folder: Path, iteration: int, batch_size: int) -> Resources:
    """What metrics.jsonl says of training up to an iteration."""
    seconds, reached = 0.0, 0
    peaks: dict[str, tuple[float, str]] = {}
    for row in _read_rows(folder / METRICS_FILE):
        if not isinstance(row.get("iteration"), int) or row["iteration"] > iteration:
            continue
        rate = row.get("images_per_second")
        if isinstance(rate, (int, float)) and rate > 0:
            seconds += max(0, row["iteration"] - reached) * batch_size / rate
            reached = row["iteration"]
        for name, value in row.items():
            match = _PEAK.fullmatch(name)
            if match is not None and _is_finite(value) and value > peaks.get(match["kind"], (0, ""))[0]:
                peaks[match["kind"]] = (float(value), match["phase"] or "")
    return Resources(seconds / 60 if reached else None, peaks)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut short by a kill; resuming drops it too
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        warn_once(f"{path}: is not JSON ({error}); it is left out")
        return None
    return content if isinstance(content, dict) else None


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
