"""torch's compiler stays away while nothing is compiled, and is there for whoever needs it."""

import subprocess
import sys

import pytest

#: each in a program of its own, since the compiler stays once it has been imported
PROGRAMS = {
    "an optimiser steps without the compiler": """
weight = torch.nn.Parameter(torch.ones(3))
with without_compiler():
    optimizer = torch.optim.Adam([weight], lr=0.5)
    weight.grad = torch.ones(3)
    optimizer.step()
assert weight.tolist() == pytest.approx([0.5] * 3)
assert not is_imported()
optimizer.step()  # as ever
assert "torch._dynamo" not in sys.modules or is_imported()
""",
    "it makes room where more of it is needed": """
with without_compiler():
    from torch._dynamo.utils import counters
    assert is_imported()
assert torch._dynamo.utils.counters is counters
""",
    "it makes room for a part that is imported": """
with without_compiler():
    import torch._dynamo.config
    assert is_imported()
""",
    "one that is there already stays": """
import torch._dynamo
before = torch._dynamo
with without_compiler():
    assert torch._dynamo is before
assert torch._dynamo is before
""",
    "it goes when an error passes": """
try:
    with without_compiler():
        raise KeyError
except KeyError:
    pass
import torch._dynamo
assert is_imported()
""",
}
BEGINNING = """
import sys
import pytest
import torch
from graf.runtime.compiler_stand_in import without_compiler

def is_imported():
    return hasattr(sys.modules.get("torch._dynamo"), "__file__")
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_compiler(name):
    done = subprocess.run([sys.executable, "-c", BEGINNING + PROGRAMS[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
