"""The radiance field as a program for others: torch.export (.pt2) and ONNX, each compared with the field itself.

rgb is held to 1e-5. Densities go into the hundreds, where float32 itself rounds by more, so they are held to 1e-5 of
the largest one that was met (of 1, where that is below 1).

Inputs: codes z (B, dim_z) float32, class_idx (B,) int64, points (B, N, S, 3) and unit directions (B, N, 3) float32: S
samples along N rays of each of B objects, in world units. Outputs: rgb (B, N, S, 3) in [-1, 1] and density (B, N, S),
per world unit. B, N and S may be anything from 1 on. It computes in float32, whatever training used.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graf.base.errors import UserError
from graf.base.extras import import_optional
from graf.base.files import write_atomically
from graf.models.field import RadianceField
from graf.runtime.torch_release import torch_release

INPUTS, OUTPUTS = ("z", "class_idx", "points", "directions"), ("rgb", "density")
TOLERANCE = 1e-5
#: (B, N, S) that the program is made from; none may be 1, which a tracer takes for a constant
EXAMPLE_SIZE = (2, 5, 3)
#: sizes that it is compared at: the example's, single ones, and others in every place
CHECKED_SIZES = (EXAMPLE_SIZE, (1, 1, 1), (3, 7, 11), (5, 64, 24))
#: half of the side of the cube that points are drawn from, world units: most inside the unit sphere, some beyond
_REACH = 1.1

#: 2.6 and older have been seen to fix sizes; 2.14 and 2.15 to keep all three free
OLDEST_TORCH = (2, 7)

#: (z, class_idx, points, directions) -> (rgb, density)
Program = Callable[..., Sequence[Tensor]]


class ExportError(UserError):
    """A program could not be made, or does not compute what the field computes."""


@dataclass(frozen=True)
class Differences:
    """The largest differences of a program from its field, and the largest density that was met.

    A density is the activated output of a network times nerf.density_scale, so its rounding grows with the largest one.
    """

    rgb: float
    density: float
    largest_density: float

    @property
    def are_small(self) -> bool:
        """Whether both are within TOLERANCE; NaN is not."""
        return self.rgb <= TOLERANCE and self.density <= TOLERANCE * max(1.0, self.largest_density)

    def text(self) -> str:
        """One phrase for the log."""
        sizes = ", ".join("x".join(map(str, size)) for size in CHECKED_SIZES)
        density = f"{self.density:.1e} of up to {self.largest_density:.3g}"
        return f"largest difference rgb {self.rgb:.1e}, density {density} (batch x rays x samples: {sizes})"


class WholeField(nn.Module):
    """A field with its preparation in one call, on the CPU, in float32."""

    def __init__(self, field: RadianceField) -> None:
        super().__init__()
        self.field = copy.deepcopy(field).cpu().float().eval().requires_grad_(False)

    def forward(self, z: Tensor, class_idx: Tensor, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.field(points, directions, self.field.prepare(z, class_idx))
        return found


def write_torch_program(
    path: Path | str, field: RadianceField, num_classes: int, meta: Mapping[str, Any]
) -> Differences:
    """Write the field as a torch.export program, with `meta` as its extra file graf.json.

    `torch.export.load(path).module()` is the function. The file is read back and compared before it takes its place;
    raises ExportError where a difference exceeds TOLERANCE, or for a torch that is too old.
    """
    whole = WholeField(field)
    exported = _trace(whole, num_classes)
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files={"graf.json": json.dumps(meta)})
    loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()
    differences = _compare(loaded, whole, num_classes, Path(path))
    write_atomically(path, buffer.getvalue())
    return differences


def write_onnx(path: Path | str, field: RadianceField, num_classes: int, meta: Mapping[str, Any]) -> Differences:
    """Write the field as an ONNX model, with `meta` as JSON under `graf` in its metadata.

    The bytes are run by onnxruntime and compared before the file takes its place; raises ExportError where a
    difference exceeds TOLERANCE, and MissingExtra without onnx, onnxscript and onnxruntime.
    """
    onnx, runtime = import_optional("onnx", "export"), import_optional("onnxruntime", "export")
    import_optional("onnxscript", "export")  # what torch.onnx builds with
    whole = WholeField(field)
    made = torch.onnx.export(
        _trace(whole, num_classes), dynamo=True, verbose=False, input_names=INPUTS, output_names=OUTPUTS
    )
    assert made is not None
    model = made.model_proto
    _name_dimensions(model)
    model.metadata_props.append(onnx.StringStringEntryProto(key="graf", value=json.dumps(meta)))
    onnx.checker.check_model(model, full_check=True)
    content = model.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(*given: Tensor) -> list[Tensor]:
        inputs = {name: tensor.numpy() for name, tensor in zip(INPUTS, given, strict=True)}
        return [torch.from_numpy(array) for array in session.run(list(OUTPUTS), inputs)]

    differences = _compare(run, whole, num_classes, Path(path))
    write_atomically(path, content)
    return differences


def draw_inputs(size: tuple[int, int, int], dim_z: int, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of B, N, S = size from a fixed seed: normal codes, all classes, points in and around the unit sphere."""
    batch, rays, samples = size
    generator = torch.Generator().manual_seed(batch + 100 * rays + 10_000 * samples)
    directions = torch.randn(batch, rays, 3, generator=generator)
    return (
        torch.randn(batch, dim_z, generator=generator),
        torch.arange(batch) % num_classes,
        _REACH * (2 * torch.rand(batch, rays, samples, 3, generator=generator) - 1),
        directions / directions.norm(dim=-1, keepdim=True),
    )


def _trace(whole: WholeField, num_classes: int) -> Any:
    if torch_release() < OLDEST_TORCH:
        raise ExportError(
            f"torch {torch.__version__} cannot export programs whose sizes are free; update torch to "
            f"{OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, or write weights with --to safetensors"
        )
    batch, rays, samples = (torch.export.Dim(name, min=1) for name in ("batch", "rays", "samples"))
    sizes = ({0: batch}, {0: batch}, {0: batch, 1: rays, 2: samples}, {0: batch, 1: rays})
    inputs = draw_inputs(EXAMPLE_SIZE, whole.field.dim_z, num_classes)
    with torch.no_grad():
        return torch.export.export(whole, inputs, dynamic_shapes=dict(zip(INPUTS, sizes, strict=True)))


def _name_dimensions(model: Any) -> None:
    """Call the free sizes batch, rays and samples, which torch numbers (s38, ...)."""
    points = next(value for value in model.graph.input if value.name == "points").type.tensor_type.shape.dim
    names = {dimension.dim_param: name for dimension, name in zip(points, ("batch", "rays", "samples"), strict=False)}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in names:
                dimension.dim_param = names[dimension.dim_param]


def _compare(program: Program, whole: WholeField, num_classes: int, path: Path) -> Differences:
    """How far a program is from the field at CHECKED_SIZES; raises ExportError beyond TOLERANCE."""
    worst = Differences(0.0, 0.0, 0.0)
    for size in CHECKED_SIZES:
        inputs = draw_inputs(size, whole.field.dim_z, num_classes)
        with torch.no_grad():
            true_rgb, true_density = whole(*inputs)
        try:
            with torch.no_grad():
                rgb, density = program(*inputs)
        except Exception as error:  # a fixed size fails; onnxruntime's own errors share no class but this
            reason = " ".join(str(error).split())[:200]
            raise ExportError(
                f"{path}: not written: it does not run at batch, rays, samples {size}: {reason}"
            ) from error
        found = ((rgb - true_rgb).abs(), (density - true_density).abs(), true_density)
        known = (worst.rgb, worst.density, worst.largest_density)
        largest = [torch.maximum(now.max(), torch.tensor(most)) for now, most in zip(found, known, strict=True)]
        worst = Differences(*map(float, largest))  # maximum keeps NaN, which max() may lose
    if not worst.are_small:
        raise ExportError(
            f"{path}: not written: {worst.text()}; expected at most {TOLERANCE:g} of rgb, and of density at most "
            f"{TOLERANCE:g} of the largest"
        )
    return worst
