"""`graf train --profile N`: a trace of N steps in the run folder, and where their time went in the log."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor

from graf.app.runs import RunFolder
from graf.runtime.logs import logger
from graf.runtime.profiling import StepProfiler
from graf.training.trainer import Trainer

#: steps before those that are recorded: memory is measured in the first one of each kind, and libraries start
WARM_UP = 5


@dataclass
class ProfileHook:
    """Records steps, with what the other hooks do after each of them; to be called last; a context manager.

    It writes trace_XXXXXXXX.json, named after the last iteration in it, and changes nothing else: training goes on.
    """

    trainer: Trainer
    folder: RunFolder
    steps: int
    _profiler: StepProfiler = field(init=False)

    def __post_init__(self) -> None:
        self._profiler = StepProfiler(self.trainer.device, WARM_UP, self.steps, self._report)

    def __call__(self, trainer: Trainer, statistics: dict[str, Tensor]) -> None:
        self._profiler.step()

    def _report(self, profiler: StepProfiler) -> None:
        split = profiler.split
        if split is None or not split.steps:
            return
        path = self.folder.path / f"trace_{self.trainer.progress.iteration:08d}.json"
        profiler.write_trace(path)
        logger.info("profile: %s", split.describe())
        logger.info("trace of these steps, for ui.perfetto.dev or chrome://tracing: %s", path)

    def __enter__(self) -> ProfileHook:
        self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._profiler.__exit__(kind, error, traceback)
        if error is None and (self._profiler.split is None or not self._profiler.split.steps):
            logger.warning(
                "--profile %d: the run has ended before a step was recorded, %d iterations after its start at the "
                "earliest; there is no trace",
                self.steps,
                WARM_UP + 1,
            )
