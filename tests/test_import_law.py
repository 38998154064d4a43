"""The import law, read off the imports of every file: which room may use which, and who names device modules."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "graf").rglob("*.py"))

#: room -> the other rooms that it may import
LAW = {
    "": {"app"},  # graf/__init__.py hands on what people import
    "base": set(),
    "config": {"base"},
    "runtime": {"base"},
    "geometry": {"base"},
    "data": {"base", "runtime", "geometry"},
    "models": {"base", "runtime", "geometry"},
    "training": {"base", "runtime", "geometry", "data", "models"},
    "evaluation": {"base", "runtime", "geometry", "data", "models"},
    "mesh": {"base", "runtime", "geometry", "models", "evaluation"},
    "capture": {"base", "runtime", "geometry", "data"},
    "inversion": {"base", "runtime", "geometry", "data", "models", "training", "evaluation"},
    "sharing": {"base", "runtime", "geometry", "models", "evaluation", "mesh"},
    "viewer": {"base", "runtime", "geometry", "data", "models", "evaluation", "mesh"},
}
#: the room that holds the commands and their parts, and so may join all others; only graf/__init__.py imports it
COMPOSITION_ROOM = "app"
#: `python -m graf`
ENTRY_POINT = "__main__"
#: besides the composition room, the only file that unpacks the Config
CONFIG_READER = "training.trainer"
DEVICE_MODULES = {"cuda", "mps", "amp", "distributed"}


def module_name(path: Path) -> str:
    """`training.trainer` of graf/training/trainer.py; "" of graf/__init__.py."""
    parts = path.relative_to(ROOT / "graf").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_composition_root(module: str) -> bool:
    return module.partition(".")[0] in (COMPOSITION_ROOM, ENTRY_POINT)


def imported_modules(source: str, package: str) -> set[str]:
    """Every module or name that `source` imports, anywhere in it, in full; `package` resolves relative imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def broken_laws(source: str, module: str) -> list[str]:
    """What the file `graf.<module>` imports from graf and may not."""
    if is_composition_root(module):
        return []
    room = module.partition(".")[0]
    if room and room not in LAW:
        return [f"graf.{module}: belongs to no room"]
    package = f"graf.{module.rpartition('.')[0]}".rstrip(".")
    broken = []
    for name in sorted(imported_modules(source, package)):
        top, _, inside = name.partition(".")
        other = inside.partition(".")[0]
        allowed = other in LAW.get(room, set()) or (other == "config" and module == CONFIG_READER)
        if top == "graf" and other != room and not allowed:
            broken.append(f"graf.{module} imports {name}")
    return broken


def device_modules_named(source: str) -> set[str]:
    """Which of torch.cuda, torch.mps, torch.amp and torch.distributed a source names or imports."""
    tree = ast.parse(source)
    named = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"
    }
    named |= {name.split(".")[1] for name in imported_modules(source, "graf") if name.startswith("torch.")}
    return named & DEVICE_MODULES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: module_name(path) or "graf")
def test_every_file_keeps_the_import_law(path):
    assert broken_laws(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "train.py", ROOT / "eval.py"], ids=lambda path: path.stem)
def test_only_the_runtime_names_torchs_device_modules(path):
    if not path.is_relative_to(ROOT / "graf" / "runtime"):
        assert device_modules_named(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(("name", "home"), [("amp", "amp"), ("distributed", "distributed")])
def test_torch_amp_and_torch_distributed_are_each_named_in_one_file(name, home):
    files = {path.stem for path in SOURCES if name in device_modules_named(path.read_text(encoding="utf-8"))}
    assert files <= {home}


@pytest.mark.parametrize("room", sorted(LAW))
def test_every_room_exists(room):
    assert any(module_name(path).partition(".")[0] == room for path in SOURCES)


def test_there_is_a_composition_room_inside_graf():
    assert any(is_composition_root(module_name(path)) for path in SOURCES)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "import graf.runtime.logs"),
        ("runtime.amp", "from graf.config import Config"),
        ("geometry.rays", "from graf.models.field import RadianceField"),
        ("geometry.rays", "def f():\n    from graf.runtime import amp"),
        ("data.labels", "from graf.models.field import RadianceField"),
        ("data.labels", "from ..config import Config"),
        ("data.labels", "from ..app import doctor"),
        ("models.field", "from graf.data import labels"),
        ("models.field", "from .. import training"),
        ("training.inputs", "from graf.config import Config"),
        ("training.trainer", "from graf.evaluation.renderer import Renderer"),
        ("evaluation.renderer", "if True:\n    import graf.training.ema"),
        ("evaluation.renderer", "from graf.app import builders"),
        ("evaluation.renderer", "from graf.app.doctor import main"),
        ("", "from graf.config import Config"),
        ("misc.tools", "import math"),
    ],
)
def test_a_breach_of_the_law_is_found(module, source):
    assert broken_laws(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("training.trainer", "from graf.config import Config\nfrom graf.training import losses"),
        ("app.doctor", "from graf.config import load_config\nfrom graf.runtime.logs import logger"),
        ("models.field", "from graf.runtime.amp import float32_region\nimport torch"),
        ("runtime.memory", "from .logs import info_once\nfrom graf.runtime import logs"),
        ("app.builders", "from graf.training import trainer\nfrom graf.evaluation import renderer"),
    ],
)
def test_what_the_law_allows_passes(module, source):
    assert broken_laws(source, module) == []


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import torch\ntorch.cuda.empty_cache()", {"cuda"}),
        ("import torch.amp", {"amp"}),
        ("from torch import mps", {"mps"}),
        ("from torch.distributed import init_process_group", {"distributed"}),
        ("import torch\n'torch.cuda'; torch.nn.cuda = 1", set()),
    ],
)
def test_a_named_device_module_is_found(source, named):
    assert device_modules_named(source) == named
