"""The command `data`: list, info, verify, report, convert, download and collect."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rl_shift.commands import check_seed, limit_torch
from rl_shift.errors import UserError, nearest
from rl_shift.options import asked, split

TEXT = """usage: rl-shift data ACTION ...

actions:
  list                           every known dataset and whether its file is here
  info ID|PATH                   environment, scores and statistics of a dataset
  verify ID|PATH [--against d4rl]  read a file anew and say what is wrong with it
  report ID|PATH... [--out DIR]  compare datasets: returns, lengths, coverage, quality, picture
  convert ID|PATH OUT            write it as HDF5 (D4RL), NPZ (OGBench) or Minari dataset
  download ID [--base-url URL]   fetch a D4RL file ($D4RL_BASE_URL is the default address)
  collect --policy P --env ID --steps N --out FILE
                                 record policies as a file in D4RL's layout

`rl-shift data ACTION --help` shows its options. Files are looked for in $RL_SHIFT_DATA,
$D4RL_DATASET_DIR and ~/.d4rl/datasets."""


def data(argv: list[str]) -> int:
    """`rl-shift data`."""
    actions: dict[str, Callable[[list[str]], int]] = {
        "list": _list,
        "info": _info,
        "verify": _verify,
        "report": _report,
        "convert": _convert,
        "download": _download,
        "collect": _collect,
    }
    if argv and argv[0] in ("-h", "--help"):
        print(TEXT)
        return 0
    if not argv or argv[0] not in actions:
        hint = nearest(argv[0], actions) if argv else ""
        raise UserError(f"rl-shift data takes one of {', '.join(actions)}{hint}")
    return actions[argv[0]](argv[1:])


# ---- list, info, verify ------------------------------------------------------------------------


def _list(argv: list[str]) -> int:
    if _one_argument("list", argv, 0, "Lists every known dataset id and the local files.") is None:
        return 0
    print_table()
    return 0


def print_table() -> None:
    """One line per dataset: id, kind, environment, where its file lies."""
    from rl_shift.dataset_reports import list_datasets

    rows = list_datasets()
    width = max(len(row["id"]) for row in rows)
    for row in rows:
        env_id = row["env_id"] or "no Gymnasium environment"
        place = row["path"] or "not here"
        print(f"{row['id']:{width}}  {row['kind']:11}  {env_id:26}  {place}")


def _info(argv: list[str]) -> int:
    text = "Reads a dataset and describes it: environment, reference scores, returns, lengths."
    name = _one_argument("info", argv, 1, text)
    if name is None:
        return 0
    from rl_shift.dataset_reports import info

    report = info(name[0])
    numbers, said = report.pop("statistics"), report.pop("notes")
    _print_fields(report | {k: v for k, v in numbers.items() if not isinstance(v, list)})
    for note in said:
        print(f"note: {note}")
    return 0


@dataclass(frozen=True)
class VerifySettings:
    """Flags of `rl-shift data verify`."""

    against: Literal["d4rl"] | None = None  # also compare legacy mode with this package, row by row


def _verify(argv: list[str]) -> int:
    given = asked(
        VerifySettings,
        argv,
        usage="rl-shift data verify ID|PATH [--against d4rl]",
        description="Reads a file anew, past every cache, and says what training would refuse.",
    )
    if given is None:
        return 0
    words, settings, _ = given
    if len(words) != 1:
        told = " ".join(words) or "nothing"
        raise UserError(f"rl-shift data verify takes ID|PATH, not {told}")
    from rl_shift.dataset_reports import against_d4rl, verify

    report = verify(words[0])
    problems, warnings = report.pop("problems"), report.pop("warnings")
    if settings.against is not None and not problems:
        count, differing = against_d4rl(words[0])
        problems += [f"{name} differ from d4rl's qlearning_dataset" for name in differing]
        report["legacy mode"] = f"equal to d4rl's qlearning_dataset in all {count} transitions"
    for problem in problems:
        print(f"rl-shift: problem: {problem}", file=sys.stderr)
    if problems:
        return 2
    _print_fields(report)
    for warning in warnings:
        print(f"warning: {warning}")
    print("ok")
    return 0


# ---- report, convert ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportSettings:
    """Flags of `rl-shift data report`."""

    out: str = "data-report"  # folder of data-report.md and data-report.png
    rows: int = 20_000  # of each dataset that are looked at
    queries: int = 1500  # of these, the states whose neighbours are looked at
    k: int = 20  # neighbours, from other episodes
    radius: float = 1.0  # of state similarity, in standard deviations
    seed: int = 0  # of the draws
    threads: int = 1  # CPU threads


def _report(argv: list[str]) -> int:
    given = asked(
        ReportSettings,
        argv,
        usage="rl-shift data report ID|PATH... [--out DIR] [options]",
        description="Compares datasets of one environment: returns, lengths, coverage of the "
        "states, action variance (low where the state decides the action), state similarity and "
        "transition diversity.",
    )
    if given is None:
        return 0
    words, settings, _ = given
    if not words:
        raise UserError("give at least one ID|PATH: rl-shift data report ID|PATH...")
    if min(settings.rows, settings.queries, settings.k) < 1 or settings.radius <= 0:
        raise UserError("--rows, --queries and --k must be at least 1, --radius above 0")
    check_seed(settings.seed)
    limit_torch(settings.threads)
    from rl_shift.data_report import report

    return report(words, settings)


@dataclass(frozen=True)
class ConvertSettings:
    """Flags of `rl-shift data convert`."""

    compression: str | None = None  # of HDF5, such as gzip; uncompressed files load fastest
    overwrite: bool = False  # replace the file if it exists


def _convert(argv: list[str]) -> int:
    given = asked(
        ConvertSettings,
        argv,
        usage="rl-shift data convert ID|PATH|minari:ID OUT.hdf5|OUT.npz|minari:ID",
        description="Writes a dataset in another format. Transitions, episode ends and facts about "
        'the environment are kept; Minari needs pip install "rl_shift[minari]".',
    )
    if given is None:
        return 0
    words, settings, _ = given
    if len(words) != 2:
        raise UserError("give a dataset and where to write it: rl-shift data convert ID|PATH OUT")
    _check_new(Path(words[1]), settings.overwrite)
    from rl_shift.data_convert import convert

    print(f"saved {convert(words[0], words[1], settings.compression)}")
    return 0


# ---- download, collect -------------------------------------------------------------------------


@dataclass(frozen=True)
class DownloadSettings:
    """Flags of `rl-shift data download`."""

    base_url: str | None = None  # the server's address; default: $D4RL_BASE_URL
    timeout: float = 10.0  # seconds without data after which to give up


def _download(argv: list[str]) -> int:
    given = asked(
        DownloadSettings,
        argv,
        usage="rl-shift data download ID [--base-url URL] [--timeout SECONDS]",
        description="Fetches a D4RL file into $D4RL_DATASET_DIR or ~/.d4rl/datasets.",
    )
    if given is None:
        return 0
    words, settings, _ = given
    if len(words) != 1:
        raise UserError(f"give one dataset ID, not {len(words)}: rl-shift data download ID")
    from rl_shift.downloading import download

    with _Bar("download", None, "B") as advance:
        path = download(words[0], settings.base_url, settings.timeout, advance)
    print(f"saved {path}")
    return 0


@dataclass(frozen=True)
class CollectSettings:
    """Flags of `rl-shift data collect`."""

    env: str | None = None  # Gymnasium id (required)
    steps: int | None = None  # transitions in all (required)
    out: str | None = None  # the HDF5 file to write (required)
    noise: float = 0.0  # standard deviation of Gaussian noise on the actions
    seed: int = 0  # of environments and noise
    compression: str | None = None  # such as gzip; uncompressed files load fastest
    overwrite: bool = False  # replace the file if it exists
    threads: int = 1  # CPU threads


def _collect(argv: list[str]) -> int:
    given = asked(
        CollectSettings,
        argv,
        usage="rl-shift data collect --policy RUN_DIR|NPZ|random [--policy ...]... --env ID "
        "--steps N --out FILE [options]",
        description="Records policies as a file in D4RL's v2 layout; several --policy share the "
        "steps. Equal arguments give an equal file.",
        repeated=("--policy",),
    )
    if given is None:
        return 0
    words, settings, [policies] = given
    if words:
        raise UserError(f"unexpected argument {words[0]!r}; policies are given with --policy")
    if not policies or settings.env is None or settings.steps is None or settings.out is None:
        raise UserError("rl-shift data collect needs --policy, --env, --steps and --out")
    out = Path(settings.out)
    if out.suffix not in (".hdf5", ".h5"):
        raise UserError(f"--out {out} must end in .hdf5 or .h5, which datasets are found by")
    check_seed(settings.seed)
    _check_new(out, settings.overwrite)
    limit_torch(settings.threads)
    from rl_shift.recording import record

    with _Bar("collect", settings.steps, " steps") as advance:
        path = record(
            policies,
            settings.env,
            settings.steps,
            settings.out,
            settings.noise,
            settings.seed,
            compression=settings.compression,
            progress=advance,
        )
    print(f"saved {path}")
    return 0


def _check_new(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: choose another name, or give --overwrite true")


class _Bar:
    """A bar on a terminal, nothing elsewhere; hands out a function that takes the total so far."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        from tqdm import tqdm

        hidden = not sys.stderr.isatty()
        self.bar: Any = tqdm(total=total, desc=label, unit=unit, unit_scale=True, disable=hidden)

    def __enter__(self) -> Callable[[int], None]:
        return self._to

    def _to(self, count: int) -> None:
        self.bar.update(count - self.bar.n)

    def __exit__(self, *error: object) -> None:
        self.bar.close()


def _one_argument(action: str, argv: list[str], count: int, text: str) -> list[str] | None:
    """The positional words of an action without flags; None if it only asks for help."""
    names = " ID|PATH" * count
    if {"--help", "-h"} & set(argv):
        print(f"usage: rl-shift data {action}{names}\n\n{text}")
        return None
    words, flags = split(argv)
    if flags or len(words) != count:
        given = (flags + words)[0] if flags or words else "nothing"
        raise UserError(f"rl-shift data {action} takes{names or ' no argument'}, not {given}")
    return words


def _print_fields(fields: dict[str, Any]) -> None:
    width = max(map(len, fields))
    for name, value in fields.items():
        if isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            value = " ".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in value)
        print(f"{name:{width}}  {value}")
