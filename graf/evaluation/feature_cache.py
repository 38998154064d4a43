"""Features of photographs from score to score, in files that carry numbers and no code.

torch-fidelity unpickles whatever lies in its cache, and run folders are passed on from hand to hand. So its cache is a
private folder that lasts for one call, and what stays is kept here: an array of NumPy's format, which holds no objects,
behind one line that says what it is the feature of and what its hash is. What does not match is computed again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from graf.base.files import write_atomically
from graf.runtime.logs import warn_once
from graf.runtime.sealed_archive import load_plainly

#: raise it when the images handed to an extractor change, or the layout of a file
FORMAT = 2
_PART = "-features-"


class FeatureCache:
    """The cached features of one set of images, named by everything that they depend on.

    folder: where the files of all sets are; protocol: plain values that features depend on, as JSON knows them.
    """

    def __init__(self, folder: Path | str, protocol: Sequence[object]) -> None:
        self.folder = Path(folder)
        self.protocol = json.dumps([FORMAT, *protocol])
        self.name = f"graf-{hashlib.sha256(self.protocol.encode()).hexdigest()[:32]}"

    @contextmanager
    def lend(self) -> Iterator[Path]:
        """A private folder for the cache of one call of torch-fidelity, whose input is called `name`.

        It holds what is kept; what the call adds to it is kept from then on. A disk that refuses costs the next score
        the time to compute the features, and is said.
        """
        with tempfile.TemporaryDirectory(prefix="graf-features-") as private:
            known = self._fetch(Path(private))
            yield Path(private)
            for file in sorted(Path(private).glob(f"{self.name}-*{_PART}*.pt")):
                if file.name not in known:
                    features = load_plainly(file)
                    self._keep(file.stem, features.cpu().numpy())

    def _fetch(self, private: Path) -> set[str]:
        """Write what is kept as torch-fidelity reads it; returns the names of these files."""
        known = set()
        for file in sorted(self.folder.glob(f"{self.name}-*{_PART}*.features")):
            features = self._read(file)
            if features is not None:
                torch.save(torch.from_numpy(features), private / f"{file.stem}.pt")
                known.add(f"{file.stem}.pt")
        return known

    def _read(self, file: Path) -> np.ndarray | None:
        try:
            head, _, body = file.read_bytes().partition(b"\n")
            facts = json.loads(head)
            if facts["protocol"] != self.protocol or facts["file"] != file.name:
                raise ValueError("it belongs to other images")
            if facts["sha256"] != hashlib.sha256(body).hexdigest():
                raise ValueError("it is damaged")
            features = np.load(io.BytesIO(body), allow_pickle=False)
            if not isinstance(features, np.ndarray) or features.ndim != 2 or features.dtype.kind != "f":
                raise ValueError("it holds no features")
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
            warn_once(f"{file}: is not used ({error}); its features are computed again")
            return None
        return features

    def _keep(self, stem: str, features: np.ndarray) -> None:
        body, file = io.BytesIO(), self.folder / f"{stem}.features"
        np.save(body, np.ascontiguousarray(features), allow_pickle=False)
        facts = {
            "protocol": self.protocol,
            "file": file.name,
            "sha256": hashlib.sha256(body.getvalue()).hexdigest(),
        }
        try:
            write_atomically(file, json.dumps(facts).encode("ascii") + b"\n" + body.getvalue())
        except OSError as error:
            warn_once(f"{self.folder}: features are not kept ({error}); every score computes them again")
