"""The distribution: what it declares, that its lists agree, and that it works where there is no checkout."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.yaml"))

#: packages that are imported by another name than the one that is declared
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "torch_fidelity": "torch-fidelity", "imageio_ffmpeg": "imageio"}
#: the same for what extras bring
OPTIONAL_DISTRIBUTIONS = {
    "skimage": "scikit-image",
    "cv2": "opencv-python-headless",
    "pillow_heif": "pillow-heif",
    "huggingface_hub": "huggingface_hub",
}
#: imported where they are installed, and said to be missing where they are not
OPTIONAL = {"lpips"}


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_requirement_file_and_the_package_ask_for_the_same(project):
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split() == project["project"]["dependencies"]


def test_every_package_that_is_imported_is_declared(project):
    declared = {re.match(r"[\w-]+", line)[0] for line in project["project"]["dependencies"]}
    imported = set()
    for path in (ROOT / "graf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported |= {name.partition(".")[0] for name in names}
    foreign = imported - {*sys.stdlib_module_names, "graf", *OPTIONAL}
    assert {"torch", "numpy", "PIL"} <= foreign
    assert {DISTRIBUTIONS.get(name, name) for name in foreign} <= declared


def test_every_extra_is_installed_for_the_tests_and_part_of_all(project):
    extras = project["project"]["optional-dependencies"]
    whole = extras.pop("all")
    assert whole == [f"graf-ccsr[{','.join(name for name in extras if name != 'docs')}]"]
    development = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").split()
    assert {line for name, lines in extras.items() if name != "docs" for line in lines} <= set(development)


def test_every_optional_import_names_an_extra_that_brings_it(project):
    extras = project["project"]["optional-dependencies"]
    found = set()
    for path in (ROOT / "graf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_optional":
                module, extra = (argument.value for argument in node.args)
                package = module.partition(".")[0]
                brought = {re.match(r"[\w-]+", line)[0] for line in extras[extra]}
                assert OPTIONAL_DISTRIBUTIONS.get(package, package.replace("_", "-")) in brought, f"{path}: {module}"
                found.add(package)
    assert found


def test_pre_commit_runs_the_checks_of_ci():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [hook["entry"] for hook in hooks] == [line for line in lines if line.split()[:1] in (["ruff"], ["mypy"])]


@pytest.fixture(scope="module")
def installed(tmp_path_factory, project) -> Path:
    """A folder laid out as an installed package, beside a foreign package called configs."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "graf", site / "graf", ignore=shutil.ignore_patterns("__pycache__"))
    for source, place in project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"].items():
        shutil.copytree(ROOT / source, site / place)
    (site / "configs").mkdir()
    (site / "configs" / "default.yaml").write_text("seed: 99")
    return site


def test_an_installed_package_finds_every_shipped_configuration_from_anywhere(installed, tmp_path):
    code = f"""
from graf.config import load_config
for name in {CONFIGS}:
    configs = [load_config(spelling) for spelling in (name, name + ".yaml", "configs/" + name + ".yaml")]
    assert configs[0] == configs[1] == configs[2], name
    print(configs[0].expname, configs[0].seed)
"""
    result = run_python(installed, tmp_path, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} 0" for name in CONFIGS]


def test_an_installed_package_plans_without_a_checkout(installed, tmp_path):
    keys = ("training.fid_every=0", "training.sample_every=0")
    result = run_python(installed, tmp_path, "-m", "graf", "plan", "--config", "smoke", *keys)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Predicted peak")
    assert list(tmp_path.iterdir()) == []


def run_python(site: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
