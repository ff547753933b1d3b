"""What a child process of `rl_shift.launcher` runs: the command line, tied to its parent's life."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

from rl_shift.cli import main


def end_with_parent() -> None:
    """Stop (and save) when the parent ends, however it ends.

    The parent holds the other end of this process's standard input and never writes; the system
    closes it with the parent, even one that was killed.
    """
    threading.Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    with suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)  # while training this asks for a checkpoint


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
