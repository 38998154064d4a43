"""How a command ends: one line for what went wrong, and a traceback that is kept where it is a defect."""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from graf.base.errors import UserError
from graf.base.files import write_atomically
from graf.runtime.interrupt import deaf

#: a disk or folder that a person can put right -> the next step
_NEXT_STEPS = {
    **dict.fromkeys((errno.EACCES, errno.EROFS), "allow it, or choose another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another place"),
}
#: the exit code of a program that a lost reader ends: what shells make of SIGPIPE
_UNREAD = 128 + 13


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: nothing half done is left behind."""


@dataclass
class ErrorLog:
    """error.log of a run folder, which a command names as soon as it knows it.

    tells: whether this process prints the failure; of several that one has ended, only one does.
    """

    folder: Path | None = None
    tells: Callable[[Exception], bool] = lambda error: True

    def keep(self, error: Exception) -> str:
        """Write the traceback; returns where it is, or how to see it."""
        if self.folder is None:
            return "run again with --debug for its traceback"
        file = self.folder / "error.log"
        try:
            write_atomically(file, "".join(traceback.format_exception(error)))
        except OSError as failure:  # often the same full disk
            return f"{file} cannot be written, {failure.strerror}: run again with --debug for its traceback"
        return f"its traceback is in {file}"


def run_command(
    command: Callable[[ErrorLog], int], *, debug: bool, interrupted: str, ends_on_sigterm: bool = True
) -> int:
    """Run a command; the exit code is its own, or 1 (after Ctrl-C 130, after SIGTERM 143) and a last line on stderr
    says what is wrong. A command whose output nobody reads any more (`| head`) ends without a word, with 141.

    debug: print the traceback of a failure too; interrupted: what to say after these signals; ends_on_sigterm: not for
    a command that hears it itself in time, and before that may wait for other processes, where only the system ends it.
    """
    log = ErrorLog()
    with _lost_readers():
        try:
            with _ended_by_sigterm() if ends_on_sigterm else nullcontext(), _short_thread_failures(debug):
                return command(log)
        except KeyboardInterrupt as request:
            _say(f"error: {interrupted}")
            return 128 + (signal.SIGTERM if isinstance(request, Terminated) else signal.SIGINT)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
                return _UNREAD
            with deaf():
                _tell(error, log, debug)
            return 1


def _tell(error: Exception, log: ErrorLog, debug: bool) -> None:
    """Print what went wrong, unless another process does."""
    if debug:
        _say("".join(traceback.format_exception(error)).rstrip())
    message = explain_failure(error)
    if message is None:
        where = "its traceback is above" if debug and log.folder is None else log.keep(error)
        what = ": ".join(filter(None, (type(error).__name__, _first_line(error))))
        message = f"unexpected {what} ({where})"
    if log.tells(error):
        _say(f"error: {message}")


def _say(text: str) -> None:
    """Print last words, after all that was printed before; that nobody may be there to read them is no failure."""
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        print(text, file=sys.stderr)


def _has_no_reader(stream: TextIO) -> bool:
    """Whether the reader of a pipe has gone: other pipes may break too, such as those to processes of one's own."""
    with suppress(AttributeError, OSError, ValueError):  # Windows has no poll, and not every stream is a file
        watch = select.poll()
        watch.register(stream, 0)
        return bool(watch.poll(0))
    return False


@contextmanager
def _lost_readers() -> Iterator[None]:
    """A program whose output nobody reads any more (`| tee` after Ctrl-C, a closed terminal) ends as any other."""
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # else Python tries it again at its end and exits with 120
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated, wherever nothing else (a StopRequest) hears it."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be set
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    former = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


@contextmanager
def _short_thread_failures(debug: bool) -> Iterator[None]:
    """A thread that fails, such as TensorBoard's on a full disk, is one line too; who waits for it has the error."""

    def report(failure: threading.ExceptHookArgs) -> None:
        name = "?" if failure.thread is None else failure.thread.name
        print(f"warning: {name}: {failure.exc_type.__name__}: {failure.exc_value}", file=sys.stderr)

    former = threading.excepthook
    if not debug:
        threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = former


def explain_failure(error: Exception) -> str | None:
    """What to print for a failure that the user can put right; None for any other."""
    if isinstance(error, UserError):
        return _message(error)
    if isinstance(error, OSError) and error.errno in _NEXT_STEPS and error.filename is not None:
        return f"{error.filename}: {error.strerror}; {_NEXT_STEPS[error.errno]}, and run the same command again"
    from graf.runtime.memory import is_out_of_memory  # imports torch, for which a misspelt key need not wait

    if is_out_of_memory(error):
        # What can be done in smaller pieces has been tried again so; this happened outside of it.
        return (
            "out of memory where nothing can be halved; in training lower nerf.netwidth, discriminator.ndf, "
            f"ccsr.features or training.batch_size, in eval.py --resolution or --num_images [{_first_line(error)}]"
        )
    return None


def _first_line(error: Exception) -> str:
    return _message(error).strip().partition("\n")[0][:200]


def _message(error: Exception) -> str:
    """An error's text; a process that loads images sends its own with its traceback, whose last line has the text."""
    lines = str(error).strip().splitlines()
    return lines[-1].partition(": ")[2] if lines and lines[0].startswith("Caught ") else str(error)
