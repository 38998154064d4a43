"""One process at a time in a run folder: a lock that dies with its holder, and a note of who that is.

The system's lock goes with the process, however it ends, and is not inherited by the processes that load photographs.
Where folders are shared between hosts it may reach one host only, or be missing; there the note decides, whose time
its holder renews.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from graf.base.errors import UserError
from graf.runtime.logs import logger, warn_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
#: seconds between signs of life, and without one until a holder on another host counts as gone; shared file systems may
#: show a time a minute late
RENEW_EVERY, GONE_AFTER = 10.0, 90.0

_held: set[Path] = set()  # of this process, which the system would give its own locks again


class LockedError(UserError):
    """Another process works in the folder; the message says which one and what to do."""


class UnwritableError(UserError):
    """The folder cannot be made or written; the message says which one, why and what to do."""


class RunLock:
    """Held from `with` on until the block or the process ends. Entering raises LockedError or UnwritableError.

    >>> with RunLock(folder):
    ...     pass  # nobody else trains in this folder
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []
        self._stop = threading.Event()
        self._renewal: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        try:
            return self._take()
        except OSError as error:
            raise UnwritableError(
                f"{self.file.parent}: cannot be written ({error.strerror}); choose another folder with "
                "training.outdir=FOLDER"
            ) from error

    def _take(self) -> RunLock:
        folder = self.file.parent
        self._made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.resolve() in _held:
            raise LockedError(_describe(self.file.parent, _own_note()))
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            has_lock = _try_lock(descriptor, self.file)
            if not self.file.exists() or not os.path.samestat(os.fstat(descriptor), self.file.stat()):
                raise LockedError(_describe(self.file.parent, {}))  # its holder has just removed it with the folder
            note = _read_note(descriptor)
            if has_lock is False or (note and self._is_at_work(descriptor, note, has_lock is True)):
                raise LockedError(_describe(self.file.parent, note))
            if note:
                logger.info("%s: was left by %s, which is gone", self.file.parent, _name(note))
            _write_note(descriptor, _own_note())
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self.file.resolve())
        self._stop.clear()
        self._renewal = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._renewal.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._renewal is not None:
            self._renewal.join()
        if self._descriptor is not None:
            try:
                os.ftruncate(self._descriptor, 0)  # the file stays: who opened it meanwhile must find this very one
            except OSError as error:
                logger.warning("%s: could not be cleared (%s); the next run finds it stale", self.file, error)
            _held.discard(self.file.resolve())
            self._remove_empty_folders()
            os.close(self._descriptor)
            self._descriptor = None

    def _remove_empty_folders(self) -> None:
        """Leave nothing where nothing has come of it: folders made for the lock alone go with it."""
        if self._made and [place.name for place in self.file.parent.iterdir()] == [NAME]:
            self.file.unlink()
            for place in self._made:
                with suppress(OSError):  # somebody else is there by now
                    place.rmdir()

    def _is_at_work(self, descriptor: int, note: dict[str, Any], has_lock: bool) -> bool:
        """Whether the process that wrote the note lives; one on another host is waited for until that is known."""
        is_same_host, is_same_boot = note.get("host") == socket.gethostname(), note.get("boot") == _boot()
        if has_lock and (is_same_host or (is_same_boot and _boot())):
            return False  # the system's lock tells; containers of one machine have names of their own
        if is_same_host and not has_lock:
            return is_same_boot and _is_alive(note.get("pid"))
        seen, until = os.fstat(descriptor).st_mtime_ns, time.monotonic() + GONE_AFTER  # a clock may have been set back
        while self._age(descriptor) < GONE_AFTER and time.monotonic() < until:
            warn_once(f"{self.file.parent}: finding out whether {_name(note)} is still at work there")
            time.sleep(1)
            if os.fstat(descriptor).st_mtime_ns != seen:
                return bool(_read_note(descriptor))  # without one it has just ended
        return False

    def _age(self, descriptor: int) -> float:
        """Seconds since the holder's last sign of life, by the clock of the file system that both write to."""
        probe = self.file.with_name(f"{NAME}.{secrets.token_hex(4)}.saving")
        try:
            probe.touch()
            now = probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
        return now - os.fstat(descriptor).st_mtime

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_EVERY):
            assert self._descriptor is not None
            try:
                os.utime(self._descriptor)
            except OSError as error:
                warn_once(f"{self.file}: its time cannot be renewed ({error}); another host may take this run for dead")


def _try_lock(descriptor: int, file: Path) -> bool | None:
    """Whether the lock was free; None where the system has none for this file."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        return False
    except OSError as error:
        warn_once(f"{file}: this file system has no locks ({error}); the note in it decides who trains here")
        return None
    return True


def _is_alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    if os.name == "nt":  # os.kill(pid, 0) would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _boot() -> str:
    """Which start of the machine this is, since a number of a process may come again; "" where that is not told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _own_note() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot(), "since": int(time.time())}


def _read_note(descriptor: int) -> dict[str, Any]:
    """Who holds the lock; empty where nobody does, or where the note is no note."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        note = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _write_note(descriptor: int, note: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(note).encode("ascii"))


def _name(note: dict[str, Any]) -> str:
    since = note.get("since")
    when = time.strftime(", since %Y-%m-%d %H:%M", time.localtime(since)) if isinstance(since, int) else ""
    return f"process {note.get('pid', '?')} on {note.get('host', '?')}{when}"


def _describe(folder: Path, note: dict[str, Any]) -> str:
    return (
        f"{folder}: another process trains there ({_name(note)}); wait for it, stop it, or train elsewhere with "
        "expname=another_name"
    )
