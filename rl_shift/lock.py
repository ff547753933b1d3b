"""The lock of a run folder: one process at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rl_shift.errors import UserError


class Lock:
    """Keeps a second process out of a run folder: `with Lock(run_dir): ...`.

    The file names its owner (pid, host, start time). A lock whose process is gone is taken over; a
    pid that the system gave to another process since is told apart by its start time.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self._owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "start": _started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }

    def __enter__(self) -> Lock:
        """Take the lock, or raise a UserError that names the process that holds it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.parent):
                self._take()
        except OSError as error:
            raise UserError(
                f"cannot write to the run folder {self.path.parent}: {error.strerror}; choose "
                "another with --run-dir"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock, if it is still ours."""
        with suppress(OSError):
            if _owner(self.path) == self._owner:
                self.path.unlink()

    def _take(self) -> None:
        holder = _owner(self.path)
        if holder is not None:
            if _alive(holder):
                raise UserError(
                    f"the run folder {self.path.parent} is in use by process {holder.get('pid')} on"
                    f" {holder.get('host')} since {holder.get('since')}: wait for it, stop it or "
                    f"choose another --run-dir (if that process is gone, delete {self.path})"
                )
            self.path.unlink()
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._owner))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time may judge and replace a stale lock; the system frees this one."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no flock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _owner(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; {} where its process died before it had signed."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(owner: Mapping[str, Any]) -> bool:
    """Whether the owner still runs, as far as this process can tell."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("host") != socket.gethostname() or os.name == "nt":
        return True  # out of reach; on Windows signal 0 would not ask but interrupt
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM  # another user's process
    start = _started(pid)
    return start is None or owner.get("start") in (None, start)


def _started(pid: int) -> str | None:
    """Boot and tick at which a process began; "" for one that ended, None where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # the name, in brackets, may hold spaces; state and start time are fields 3 and 22
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
