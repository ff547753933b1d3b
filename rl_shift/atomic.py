"""Files that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rl_shift.errors import UserError


@contextmanager
def replacing(path: Path, advice: str | None = None, suffix: str = "") -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end, or vanishes on an error.

    Folders on the way are made. The temporary name is hidden and keeps the suffix, which some
    writers go by.

    Args:
        path: the file to be written.
        advice: what a user can do where it cannot be written.
        suffix: of the temporary name, where `path` has none.

    Raises:
        UserError: an OSError happened, and there is advice; else the OSError itself.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix or suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if advice is None:
            raise
        reason = error.strerror or " ".join(str(error).split())[:160]
        raise UserError(f"cannot write {path}: {reason}; {advice}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str, advice: str | None = None) -> None:
    """Replace a file by this text, UTF-8, in one step; errors as `replacing`."""
    with replacing(path, advice) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path, advice: str) -> None:
    """Refuses, before the work, a file that could not be written after it.

    Raises:
        UserError: it is a folder, or nothing can be written where it shall lie.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; {advice}")
    trial = path.with_name(f".{path.name}.{os.getpid()}.trial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from error
