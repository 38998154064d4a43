"""What a machine offers to training, found by small probes, none of which can take the program down.

A probe imports what it asks about by itself, so that a missing or broken package is a line too.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from graf.base.extras import EXTRAS, REQUIRED, find_missing, name_install_command

if TYPE_CHECKING:
    import torch

    from graf.app.memory_estimator import Plan, StepPlanner
    from graf.config import Config

#: without which training does as well
SPARE = {"tensorboard"}
#: Pythons that this version has been tried on
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OLDEST_TORCH = (2, 1)


class Verdict(str, Enum):
    """ok; note: something is missing that training can do without; problem: training could not start."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """What a probe has found, and where something is missing, what to do about it."""

    name: str
    verdict: Verdict
    found: str
    hint: str = ""


class NoDevice(Exception):
    """The device that is asked for is not there, and so cannot be asked."""


@dataclass
class Machine:
    """What probes ask about: this machine, for training a configuration (a file or a shipped name) with overrides."""

    config_name: str
    overrides: Sequence[str] = ()

    @cached_property
    def config(self) -> Config:
        """The configuration. Raises ConfigError."""
        from graf.config import load_config

        return load_config(self.config_name, self.overrides)

    @cached_property
    def device(self) -> torch.device:
        """The device that training would take. Raises NoDevice."""
        from graf.base.errors import UserError
        from graf.runtime.device import pick_device

        try:
            return pick_device(self.config.training.device)
        except UserError as error:  # that NumPy does not fit torch, too
            raise NoDevice(str(error)) from error

    @cached_property
    def planner(self) -> StepPlanner:
        """Predicts what training needs of memory."""
        from graf.app.memory_estimator import StepPlanner

        try:
            return StepPlanner(self.config, device_type=self.device.type)
        except NoDevice:  # weights are as large anywhere
            return StepPlanner(self.config)

    @cached_property
    def plan(self) -> Plan:
        """What the configured settings need."""
        return self.planner.predict(self.planner.trainer.memory)

    @cached_property
    def results(self) -> Path:
        """The folder in which the run's folder is, or would be made: the nearest one that is there."""
        folder = self.config.run_folder.absolute()
        return next(place for place in (folder, *folder.parents) if place.exists())


#: a probe: verdict, what was found, hint
Answer = tuple[Verdict, str, str]
Probe = Callable[[Machine], Answer]
OK, NOTE, PROBLEM = Verdict


def check_machine(machine: Machine) -> list[Finding]:
    """Every probe's finding, in the order of PROBES. Raises ConfigError for a configuration that is none."""
    with suppress(ImportError):  # a missing package is a finding
        _ = machine.config
    return [run_probe(name, probe, machine) for name, probe in {**PROBES, **_extras()}.items()]


def run_probe(name: str, probe: Probe, machine: Machine) -> Finding:
    """A probe's finding; where it fails, that is one: a problem where training would meet it too, else a note.

    What torch warns of, and what graf logs meanwhile, becomes a part of the hint.
    """
    with _overheard() as said:
        try:
            verdict, found, hint = probe(machine)
        except NoDevice:
            verdict, found, hint = NOTE, "not known without a device", ""
        except Exception as error:
            reason = str(error).strip().partition("\n")[0][:300]
            what = f"could not be found out: {type(error).__name__}{f': {reason}' if reason else ''}"
            verdict, found, hint = (PROBLEM if name in NEEDED else NOTE), what, ""
    return Finding(name, verdict, found, "; ".join(dict.fromkeys(filter(None, [*said, hint]))))


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """The first lines of warnings and log messages inside, which are not printed."""
    said: list[str] = []
    logger, handler = logging.getLogger("graf"), logging.Handler()
    handler.emit = lambda record: said.append(_first_line(record.getMessage()))  # type: ignore[method-assign]
    handler.setLevel(logging.WARNING)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: said.append(_first_line(str(message)))
            yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:200]


def describe_findings(findings: Sequence[Finding]) -> list[str]:
    """Lines for people: a verdict, a name and what was found each, hints below, and what it comes to."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict.value:<9}{finding.name:<{width + 2}}{finding.found}")
        if finding.hint:
            lines.append(f"{'':<9}{'':<{width + 2}}-> {finding.hint}")
    problems = [finding.name for finding in findings if finding.verdict is PROBLEM]
    return [*lines, f"training could not start here: {', '.join(problems)}" if problems else "training can start here"]


# ---------------------------------------------------------------------------------------------------- programs


def probe_python(machine: Machine) -> Answer:
    """The version of Python."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return PROBLEM, found, "graf needs Python 3.10 or newer"
    if sys.version_info[:2] > NEWEST_PYTHON:
        return NOTE, found, "graf has been tried on 3.10 to 3.13"
    return OK, found, ""


def probe_packages(machine: Machine) -> Answer:
    """Whether what graf always needs is installed."""
    missing = find_missing(REQUIRED)
    if not missing:
        return OK, f"all {len(REQUIRED)} that are always needed", ""
    verdict = PROBLEM if set(missing) - SPARE else NOTE
    return verdict, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}"


def probe_torch(machine: Machine) -> Answer:
    """torch's version and what it was built for."""
    if find_missing({"torch": "torch"}):
        return PROBLEM, "not installed", "pip install torch torchvision"
    import torch

    built = "CPUs" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
    found = f"{torch.__version__}, built for {built if torch.version.hip is None else f'HIP {torch.version.hip}'}"
    if _numbers(torch.__version__) < OLDEST_TORCH:
        return PROBLEM, found, "graf needs torch 2.1 or newer"
    from graf.runtime.torch_release import find_hole

    hole = find_hole()
    if hole is not None:
        return NOTE, found, f"files of others are refused without --trust, since {hole}; update torch"
    return OK, found, ""


def probe_torchvision(machine: Machine) -> Answer:
    """Whether torchvision is there and belongs to this torch."""
    import torch

    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        return PROBLEM, "not installed", "pip install torchvision"
    except (RuntimeError, ImportError, OSError) as error:  # its operators were built for another torch
        return PROBLEM, f"cannot be loaded with torch {torch.__version__}: {_first_line(str(error))}", _REINSTALL
    found, wanted = torchvision.__version__, _torch_of_torchvision()
    if wanted is not None and wanted.partition("+")[0] != torch.__version__.partition("+")[0]:
        return PROBLEM, f"{found}, which belongs to torch {wanted} and not to {torch.__version__}", _REINSTALL
    return OK, found, ""


def _torch_of_torchvision() -> str | None:
    """The one torch that the installed torchvision is made for, as its package says; newer ones name none."""
    with suppress(metadata.PackageNotFoundError):
        for requirement in metadata.requires("torchvision") or []:
            if exactly := re.match(r"torch\s*\(?==\s*([^\s,;)]+)", requirement):
                return exactly[1]
    return None


_REINSTALL = "install both together, from the same place: pip install --force-reinstall torch torchvision"


def _numbers(version: str) -> tuple[int, int]:
    """(2, 6) of "2.6.0+cu124"."""
    first, second, *_ = version.partition("+")[0].split(".")
    return int(first), int(second)


# ---------------------------------------------------------------------------------------------------- the device


def probe_device(machine: Machine) -> Answer:
    """Whether the device is there and really computes."""
    import torch

    from graf.runtime.device import describe_device, list_devices

    try:
        device = machine.device
    except NoDevice as error:
        return PROBLEM, str(error), ""
    try:
        numbers = torch.ones(64, 64, device=device, requires_grad=True)
        (numbers @ numbers).sum().backward()
        right = numbers.grad is not None and bool((numbers.grad.cpu() == 128).all())
        found = describe_device(device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without the device
        hint = "--device cpu trains on the processor; nvidia-smi tells what else uses a GPU, and its driver"
        return PROBLEM, f"{device} is there but does not compute: {_first_line(str(error))}", hint
    if not right:
        return PROBLEM, f"{device} computes wrong numbers: a product of ones is not their sum", "--device cpu"
    others = [name for name in list_devices() if name not in (str(device), "cpu")]
    return OK, found + (f"; also {', '.join(others)}" if others else ""), ""


def probe_amp_tier(machine: Machine) -> Answer:
    """Which of torch's modules mixed precision comes from."""
    from graf.runtime.amp import name_amp_tier

    tier = name_amp_tier()
    return (NOTE if tier == "none" else OK), tier, "no mixed precision: update torch" if tier == "none" else ""


def probe_dtype(machine: Machine) -> Answer:
    """What mixed precision computes in."""
    from graf.runtime.amp import choose_precision

    precision = choose_precision(True, machine.config.training.amp_dtype, machine.device)
    return (NOTE if precision.dtype is None else OK), f"{precision.describe()} with training.use_amp", ""


def probe_bfloat16(machine: Machine) -> Answer:
    """Whether the device multiplies bfloat16 in hardware."""
    from graf.runtime.amp import has_native_bfloat16, measure_bfloat16_gain

    if not has_native_bfloat16(machine.device):
        return NOTE, f"not on {machine.device}", ""
    if machine.device.type != "cpu":
        return OK, "yes", ""
    gain = measure_bfloat16_gain()
    hint = "" if gain >= 1 else "mixed precision is float32 here, unless training.amp_dtype=bfloat16"
    return (NOTE if hint else OK), f"yes, {gain:.2f} times as fast as float32", hint


def probe_compile(machine: Machine) -> Answer:
    """Whether torch.compile could work: graf does without, exported programs may want it."""
    import torch

    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    compiler = next((path for name in wanted if (path := shutil.which(name))), None)
    if not hasattr(torch, "compile"):
        return NOTE, "torch.compile is not in this torch", "graf trains without it"
    if compiler is None:
        return NOTE, f"torch.compile without a C++ compiler ({', '.join(wanted)})", "graf trains without it"
    return OK, f"torch.compile with {compiler}", ""


def probe_cache_release(machine: Machine) -> Answer:
    """What gives cached memory back, and how long it takes."""
    from graf.runtime.memory import name_cache_release, release_cache

    return OK, f"{name_cache_release(machine.device)}, {1000 * release_cache(machine.device):.0f} ms", ""


def probe_threads(machine: Machine) -> Answer:
    """Threads of one process, and what they run on."""
    from graf.runtime.threads import count_allowed_cpus, count_usable_cpus, describe_threads, limit_threads

    limit_threads()
    text, _, advice = describe_threads().partition(": ")
    quota = "" if count_usable_cpus() == count_allowed_cpus() else f" of {count_allowed_cpus()}, by the group's quota"
    return (NOTE if advice else OK), text + quota, advice


# ---------------------------------------------------------------------------------------------------- room


def probe_memory(machine: Machine) -> Answer:
    """Free memory of the device, and whether training fits."""
    from graf.app.memory_planner import format_bytes, with_margin
    from graf.runtime.memory import read_usable_memory
    from graf.runtime.memory_settings import SMALLEST_CHUNK, MemorySettings

    kind, free = machine.device.type, read_usable_memory(machine.device)
    if free is None:
        return NOTE, f"{machine.device} does not tell what is free", "training.memory_budget sets a limit"
    try:
        need = with_margin(machine.plan.peak, kind)
    except Exception as error:  # it rests on private parts of torch
        return NOTE, f"{format_bytes(free)} free; what training needs is not known ({_first_line(str(error))})", ""
    found = f"{format_bytes(free)} free, {format_bytes(need)} predicted for {machine.config.expname}"
    if need <= free:
        return OK, found, ""
    smallest = machine.planner.predict(MemorySettings(1, "checkpoint", SMALLEST_CHUNK), between=False)
    least = with_margin(max(phase.peak for phase in smallest.phases.values()), kind)
    if least <= free:
        return NOTE, found, f"smaller pieces, which are slower, need {format_bytes(least)}: training.memory_budget=auto"
    return (
        PROBLEM,
        f"{found}, {format_bytes(least)} in the smallest pieces",
        f"graf plan --config {machine.config_name}",
    )


def probe_results(machine: Machine) -> Answer:
    """Whether the run can be written."""
    if not machine.results.is_dir():
        return PROBLEM, f"{machine.results} is a file", "set training.outdir to another folder"
    try:
        with tempfile.TemporaryFile(dir=machine.results) as file:
            file.write(b"graf")
    except OSError as error:
        return PROBLEM, f"{machine.results}: {error.strerror}", "set training.outdir to a folder that can be written"
    return OK, f"{machine.config.run_folder}, in {machine.results}", ""


def probe_disk(machine: Machine) -> Answer:
    """Free space where the run is written, and whether its checkpoints fit."""
    from graf.app.memory_planner import format_bytes
    from graf.runtime.memory import MIB

    free = shutil.disk_usage(machine.results).free
    try:
        state = next(iter(machine.plan.phases.values()))
    except Exception as error:  # as above
        reason = _first_line(str(error))
        return NOTE, f"{format_bytes(free)} free; the size of a checkpoint is not known ({reason})", ""
    one = state.weights + state.optimizer + state.average
    kept = (machine.config.training.keep_checkpoints + 2) * one  # the best one, and the one that is being written
    found, hint = f"{format_bytes(free)} free, a checkpoint takes {one / MIB:,.1f} MiB", "set training.outdir elsewhere"
    if free < 2 * one:  # a new one is written before the old one goes
        return PROBLEM, found, f"{hint}, or free some space"
    if free < kept:
        return NOTE, found, f"the run keeps {format_bytes(kept)}; lower training.keep_checkpoints, or {hint}"
    return OK, found, ""


# ---------------------------------------------------------------------------------------------------- beside training


def probe_inception(machine: Machine) -> Answer:
    """Whether the weights behind FID and KID are here."""
    from graf.evaluation.extractor import find_inception_weights

    evaluation = machine.config.evaluation
    if evaluation.feature_extractor == "offline":
        return OK, "not needed: evaluation.feature_extractor=offline", ""
    file, failures = find_inception_weights(evaluation.inception_weights)
    if file is not None:
        return OK, str(file), ""
    found, is_scored = f"none ({failures[0]})", machine.config.training.fid_every > 0
    is_needed = evaluation.feature_extractor == "inception"
    without = "scores are fid_offline and kid_offline"
    if is_needed:
        without = "training cannot start" if is_scored else "graf eval --fid_kid ends"
    if evaluation.download:
        when = "before the first step" if is_scored else "by graf eval --fid_kid"
        return NOTE, found, f"they are downloaded {when}; where that fails, {without}"
    hint = f"without them {without}; set evaluation.inception_weights, or evaluation.feature_extractor=offline"
    return (PROBLEM if is_needed and is_scored else NOTE), found, hint


def probe_ffmpeg(machine: Machine) -> Answer:
    """Whether videos can be written."""
    try:
        import imageio_ffmpeg

        return OK, str(imageio_ffmpeg.get_ffmpeg_exe()), ""
    except (ImportError, RuntimeError) as error:
        hint = 'turns become GIFs, and graf capture reads no videos: pip install "imageio[ffmpeg]"'
        return NOTE, f"none ({_first_line(str(error))})", hint


def probe_backends(machine: Machine) -> Answer:
    """What processes can be connected with."""
    from graf.runtime.distributed import list_backends

    backends = list_backends()
    if not backends:
        return NOTE, "none", "this build of torch trains in one process"
    if "nccl" not in backends and machine.device.type == "cuda":
        return NOTE, ", ".join(backends), "without nccl, gradients of several GPUs travel through the host"
    return OK, ", ".join(backends), ""


def _extras() -> dict[str, Probe]:
    """A probe for every optional extra."""
    return {f"extra {name}": _make_extra_probe(name) for name in EXTRAS}


def _make_extra_probe(name: str) -> Probe:
    def probe(machine: Machine) -> Answer:
        missing = find_missing(EXTRAS[name])
        if not missing:
            return OK, "present", ""
        return NOTE, f"missing: {', '.join(missing)}", name_install_command(name)

    return probe


PROBES: dict[str, Probe] = {
    "python": probe_python,
    "packages": probe_packages,
    "torch": probe_torch,
    "torchvision": probe_torchvision,
    "device": probe_device,
    "AMP": probe_amp_tier,
    "dtype": probe_dtype,
    "native bfloat16": probe_bfloat16,
    "compile": probe_compile,
    "cache release": probe_cache_release,
    "threads": probe_threads,
    "memory": probe_memory,
    "results": probe_results,
    "disk": probe_disk,
    "FID weights": probe_inception,
    "ffmpeg": probe_ffmpeg,
    "processes": probe_backends,
}
#: what training rests on: a probe of these that fails is a problem
NEEDED = {"packages", "torch", "torchvision", "device", "results"}
