"""The control groups that this process is in: how Linux bounds containers and batch jobs, in its two versions.

What a group says of memory is read in memory.py, of processors in threads.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: where control groups are, and the process's own among them
CONTROL_GROUPS, OWN_CONTROL_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True)
class ControlGroup:
    """A group's folder, which need not be there: a container sees its own group as the root. version: 1 or 2."""

    folder: Path
    version: int

    def read(self, file: str) -> str:
        """What a file of the group says. Raises OSError where it is not there, as where there is no limit."""
        return (self.folder / file).read_text().strip()


def find_groups(controller: str) -> list[ControlGroup]:
    """The process's groups of a controller ("memory", "cpu"), each followed by those around it, whose limits hold too.

    Empty where the system has none.
    """
    try:
        lines = [line.split(":", 2) for line in OWN_CONTROL_GROUPS.read_text().splitlines()]
    except OSError:  # not Linux
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and controller not in controllers.split(","):
            continue
        root, version = (CONTROL_GROUPS / controller, 1) if controllers else (CONTROL_GROUPS, 2)
        own = root / path.lstrip("/")
        folders = [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
        found += [ControlGroup(folder, version) for folder in folders]
    return found
