"""Optional dependencies: imported where they are used, and missed in one line that says how to get them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graf.base.errors import UserError

DISTRIBUTION = "graf-ccsr"
_CHECKOUT = Path(__file__).resolve().parents[2]
#: what is always needed besides torch and torchvision: distribution -> the module that it brings
REQUIRED = {
    "torch-fidelity": "torch_fidelity",
    "numpy": "numpy",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "imageio": "imageio",
    "pydantic": "pydantic",
    "tqdm": "tqdm",
    "tensorboard": "tensorboard",
}
#: the extras of pyproject.toml, the same way
EXTRAS = {
    "viewer": {"viser": "viser"},
    "mesh": {
        "scikit-image": "skimage",
        "scipy": "scipy",
        "fast-simplification": "fast_simplification",
    },
    "capture": {
        "imageio-ffmpeg": "imageio_ffmpeg",
        "opencv-python-headless": "cv2",
        "pycolmap": "pycolmap",
        "pillow-heif": "pillow_heif",
    },
    "export": {"safetensors": "safetensors", "onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "share": {"safetensors": "safetensors", "huggingface_hub": "huggingface_hub"},
    "track": {"wandb": "wandb", "trackio": "trackio"},
    "docs": {"zensical": "zensical"},
}


class MissingExtra(UserError):
    """A package that an optional capability needs is not installed."""


def import_optional(module: str, extra: str) -> Any:
    """Import `module`, which an extra brings. Raises MissingExtra where it is not installed.

    >>> import_optional("math", "mesh").pi > 3
    True
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.partition(".")[0] != error.name.partition(".")[0]:
            raise  # the package is there and broken: not what this message is about
        package = module.partition(".")[0]
        raise MissingExtra(f"{package} is not installed; run: {name_install_command(extra)}") from error


def name_install_command(extra: str) -> str:
    """What installs an extra, from any folder: of the checkout that this package lies in, which stays where the code
    comes from, or of the installed distribution.
    """
    is_checkout = (_CHECKOUT / "pyproject.toml").is_file()
    return f'pip install -e "{_CHECKOUT}[{extra}]"' if is_checkout else f'pip install "{DISTRIBUTION}[{extra}]"'


def find_missing(packages: Mapping[str, str]) -> list[str]:
    """The distributions of a table like EXTRAS["mesh"] whose modules are not installed; nothing is imported."""
    return [name for name, module in packages.items() if not _is_installed(module)]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # it is marked as absent, or half of it is loaded
        return False
