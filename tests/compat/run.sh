#!/usr/bin/env bash
# The suite with one version of torch, in an environment of its own: tests/compat/run.sh TORCH [PYTHON] [PYTEST ARGUMENT ...]
#
#   tests/compat/run.sh 2.1.2 3.10             torch 2.1.2 with the torchvision and NumPy of its time, on Python 3.10
#   tests/compat/run.sh newest 3.13            whatever pip takes for the newest
#   tests/compat/run.sh 1.13.1 3.10            below 2.1 only the seams run, with nothing but what they need
#   tests/compat/run.sh 2.6.0 3.12 tests/app   a part of the suite
#
# PYTHON defaults to python3's; another one is looked for among pyenv's, then on the path. ENVIRONMENT=FOLDER keeps the
# environment there, for the next run; else it is temporary. Extras that have no wheel for the combination are left out, and
# said; their tests skip.
set -euo pipefail
cd "$(dirname "$0")/../.."

torch=${1:?which torch: tests/compat/run.sh 2.1.2 3.10}
wanted=${2:-}
shift $(($# < 2 ? $# : 2))

python=python3
if [ -n "$wanted" ]; then # pyenv's first: its python3.12 on the path is a shim, which may refuse
    python=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$wanted"{,.*}/bin/python 2>/dev/null | tail -n 1 || true)
    python=${python:-python$wanted}
    if ! "$python" -c '' 2>/dev/null; then
        echo "Python $wanted is not here; $(python3 --version) takes its place"
        python=python3
    fi
fi

temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
environment=${ENVIRONMENT:-$temporary/environment}
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
export PATH="$environment/bin:$PATH"

# What belongs together: torchvision is built for one torch, and torch below 2.3 for NumPy 1
constraints=$temporary/constraints.txt
touch "$constraints"
major=${torch%%.*} rest=${torch#*.}
minor=${rest%%.*} patch=${rest#*.}
seams_only=false
if [ "$torch" != newest ]; then
    echo "torch==$torch" >>"$constraints"
    if [ "$major" = 1 ] || [ "$minor" -lt 1 ]; then seams_only=true; else echo "torchvision==0.$((minor + 15)).$patch" >>"$constraints"; fi
    if [ "$major" = 1 ] || [ "$minor" -lt 3 ]; then echo "numpy<2" >>"$constraints"; fi
fi
install() { python -m pip install --quiet --no-cache-dir --prefer-binary --constraint "$constraints" "$@"; }

marker=$environment/installed-for-$torch
if [ ! -e "$marker" ]; then
    if $seams_only; then
        install torch numpy pytest pydantic tqdm pyyaml
    else
        install -r requirements.txt pytest pytest-xdist hypothesis
        # One by one, so that one without a wheel for this combination does not take the others with it
        grep -vE '^(-r|pytest|hypothesis|ruff|mypy|types-)' requirements-dev.txt | while read -r extra; do
            install --only-binary :all: "$extra" </dev/null || echo "left out, no wheel for this combination: $extra"
        done
        python -m pip check || true
    fi
    touch "$marker"
fi

python - <<'PROGRAM'
import platform
from importlib import metadata

names = ["torch", "torchvision", "numpy", "scipy", "onnx", "onnxscript", "onnxruntime", "opencv-python-headless", "pycolmap"]
versions = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
print(f"Python {platform.python_version()},", ", ".join(f"{name} {versions.get(name, 'absent')}" for name in names))
PROGRAM
if $seams_only; then
    python -m pytest tests/compat/seams "$@"
else
    python -m pytest -rs "$@"
fi
