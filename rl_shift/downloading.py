"""Download of D4RL files from a server the user names; nothing is fetched otherwise."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from rl_shift import atomic
from rl_shift.dataset_files import check_layout, opened
from rl_shift.dataset_lookup import folders, resolve
from rl_shift.dataset_table import table
from rl_shift.errors import UserError


def download(
    id: str,
    base_url: str | None = None,
    timeout: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Fetches a D4RL file, checks it and puts it into D4RL's own cache folder.

    Args:
        id: one of the 148 ids.
        base_url: the server up to `/datasets/offline_rl`; by default `$D4RL_BASE_URL`.
        timeout: seconds without an answer or further data after which to give up; 10 by default.
        progress: called with the number of bytes so far.

    Raises:
        UserError: unknown id, no server, no network, or not the file it should be.
    """
    if id not in table():
        found = resolve(id)  # names the nearest id if there is no such dataset at all
        raise UserError(f"dataset {id!r} is not one of D4RL's; it lies in {found.path}")
    entry = table()[id]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or folders()[-1]).expanduser()
    target = folder / entry.file
    base = base_url or os.environ.get("D4RL_BASE_URL")
    by_hand = f"or put the file by hand at {target}"
    if not base:
        raise UserError(
            f"dataset {id!r}: no server is set to fetch {entry.folder}/{entry.file} from; give "
            f"--base-url URL or set D4RL_BASE_URL, {by_hand}"
        )
    base = base.rstrip("/").removesuffix("/datasets/offline_rl")
    url = f"{base}/datasets/offline_rl/{entry.folder}/{entry.file}"
    if not url.startswith(("http://", "https://", "file://")):
        raise UserError(f"--base-url {base!r} is no http, https or file address; {by_hand}")
    try:
        with (
            urllib.request.urlopen(url, timeout=timeout or 10.0) as answer,
            atomic.replacing(target) as partial,
        ):
            with partial.open("wb") as file:
                while chunk := answer.read(1 << 20):
                    file.write(chunk)
                    if progress is not None:
                        progress(file.tell())
            size = partial.stat().st_size
            if entry.size not in (None, size):
                raise UserError(
                    f"{url} gave {size} bytes, expected {entry.size}; try again, {by_hand}"
                )
            try:
                with opened(partial) as source:
                    check_layout(source)
            except UserError as error:
                reason = str(error).replace(str(partial), url)
                raise UserError(f"{reason} ({by_hand})") from error
    except (OSError, urllib.error.URLError, ValueError) as error:
        cause = getattr(error, "reason", None) or error
        raise UserError(
            f"dataset {id!r}: {url} could not be fetched ({cause}); check the network, {by_hand}"
        ) from error
    return target
