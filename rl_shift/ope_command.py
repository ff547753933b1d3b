"""`rl-shift evaluate --ope fqe`: estimates of policies from a dataset, and how good they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl_shift.commands import limit_torch
from rl_shift.errors import UserError
from rl_shift.options import Parser, options_of

if TYPE_CHECKING:
    from rl_shift.ope import Estimate

USAGE = "rl-shift evaluate RUN_DIR[#k]|POLICY.npz... --ope fqe --dataset ID|PATH [options]"
TEXT = """Estimates what policies earn from a dataset alone, by fitted Q evaluation: the discounted
return from the initial states of the data. --rollouts and --truth say how close the estimates are:
Spearman's rank correlation over the policies, mean absolute error, and regret@1, what is lost by
choosing the policy with the highest estimate."""

HORIZON = 1000  # steps of an episode of D4RL's locomotion tasks


@dataclass(frozen=True)
class OpeSettings:
    """Flags of `rl-shift evaluate --ope fqe`."""

    ope: Literal["fqe"] = "fqe"  # the estimator
    dataset: str | None = None  # id or path (required)
    updates: int = 20_000  # of the critics
    discount: float = 0.995  # of the return that is estimated
    rollouts: int = 0  # also play so many episodes of each policy in the dataset's environment
    truth: str | None = None  # JSON file of true undiscounted returns: {NAME: {return_mean: R}}
    stack: int = 1  # policies that share one process as stacked seeds; pays off on a GPU
    compile: Literal["off", "on", "graphs"] = "off"  # the critics' updates
    seed: int = 0  # of the critics, the batches and the rollouts
    json: str | None = None  # write everything to this file; policies in it already are kept
    threads: int = 1  # CPU threads


def ope(words: Sequence[str], flags: list[str]) -> int:
    """The whole command; `words` are the policies."""
    parser = Parser(options_of(OpeSettings), usage=USAGE, description=TEXT)
    if {"--help", "-h"} & set(flags):
        parser.parser.print_help()
        return 0
    settings = OpeSettings(**(parser.defaults() | parser.flags(flags)))
    if not words or settings.dataset is None:
        raise UserError(f"give at least one policy and --dataset: {USAGE}")
    if settings.stack < 1 or settings.updates < 1 or not 0 < settings.discount < 1:
        raise UserError("--stack and --updates must be at least 1, --discount between 0 and 1")
    truth = _truth(settings.truth, words)
    limit_torch(settings.threads)
    found = _estimates(words, settings)
    rows = [
        _row(found[policy], truth.get(policy), *_played(policy, settings, found))
        for policy in words
    ]
    for row in rows:
        print(_line(row))
    verdicts = _verdicts(rows, settings)
    for text, verdict in verdicts.items():
        print(
            f"against {text}: rank correlation {verdict['rank_correlation']:.2f}, mean absolute "
            f"error {verdict['absolute_error']:.1f}, regret@1 {verdict['regret']:.1f} "
            f"({100 * verdict['relative_regret']:.0f} % of best - worst)"
        )
    if settings.json is not None:
        _write(settings, rows, verdicts)
    return 0


def _estimates(words: Sequence[str], settings: OpeSettings) -> dict[str, Estimate]:
    """Estimates of all policies; those of an earlier, interrupted command are taken as they are."""
    from rl_shift.ope import estimate

    found = _earlier(settings)
    left = [policy for policy in dict.fromkeys(words) if policy not in found]
    for start in range(0, len(left), settings.stack):
        group = left[start : start + settings.stack]
        made = estimate(
            group,
            str(settings.dataset),
            settings.updates,
            {"discount": settings.discount},
            settings.seed,
            settings.compile,
        )
        found |= {one.policy: one for one in made}
        if settings.json is not None:
            _write(settings, [_row(one, None, None, None) for one in found.values()], {})
    return found


def _played(policy: str, settings: OpeSettings, found: Mapping[str, Estimate]) -> tuple[Any, Any]:
    """Discounted and undiscounted Monte-Carlo returns, (E,) each; None unless asked for."""
    if not settings.rollouts:
        return None, None
    from rl_shift import datasets
    from rl_shift.ope import discounted_returns

    env_id = datasets.resolve(str(settings.dataset)).env_id
    if env_id is None:
        raise UserError(f"--rollouts: no environment is known for {settings.dataset}")
    return discounted_returns(policy, env_id, settings.discount, settings.rollouts, settings.seed)


def _row(one: Estimate, published: float | None, discounted: Any, plain: Any) -> dict[str, Any]:
    row: dict[str, Any] = {**asdict(one), "published_return": published}
    if discounted is not None:
        row |= {"rollouts": len(plain), "discounted_return": float(discounted.mean())}
        row |= {"undiscounted_return": float(plain.mean())}
    return row


def _line(row: Mapping[str, Any]) -> str:
    text = f"{Path(row['policy']).name}: estimated discounted return {row['value']:.1f}"
    if "rollouts" in row:
        text += f", {row['discounted_return']:.1f} in {row['rollouts']} episodes"
        text += f" (undiscounted {row['undiscounted_return']:.0f})"
    if row["published_return"] is not None:
        text += f", true undiscounted return {row['published_return']:.0f}"
    return text


def _verdicts(
    rows: Sequence[Mapping[str, Any]], settings: OpeSettings
) -> dict[str, dict[str, float]]:
    """The estimates against every truth that is known for all policies.

    A discounted value V is compared with an undiscounted return as that of HORIZON steps at V's
    mean reward, V (1 - gamma) HORIZON: too much for policies that fall early.
    """
    from rl_shift.ope import judge

    if len(rows) < 2:
        return {}
    found = {}
    values = [row["value"] for row in rows]
    if all("rollouts" in row for row in rows):
        truth = [row["discounted_return"] for row in rows]
        found["own rollouts, discounted"] = asdict(judge(values, truth))
    if all(row["published_return"] is not None for row in rows):
        scaled = [value * (1 - settings.discount) * HORIZON for value in values]
        truth = [row["published_return"] for row in rows]
        found[f"the given returns (of {HORIZON} steps)"] = asdict(judge(scaled, truth))
    return found


def _truth(path: str | None, words: Sequence[str]) -> dict[str, float]:
    """True returns of the policies by the stem of their names, as Deep OPE's table has them."""
    if path is None:
        return {}
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {Path(name).stem: float(row["return_mean"]) for name, row in table.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--truth {path} is no table of returns ({reason}): it must "
            'look like {"NAME": {"return_mean": 1.5}}'
        ) from error
    missing = [word for word in words if Path(word).stem not in known]
    if missing:
        raise UserError(f"--truth {path} knows nothing of {Path(missing[0]).stem}")
    return {word: known[Path(word).stem] for word in words}


def _fixed(settings: OpeSettings) -> dict[str, Any]:
    """What an earlier file must agree on."""
    names = ("ope", "dataset", "updates", "discount", "seed")
    return {name: getattr(settings, name) for name in names}


def _earlier(settings: OpeSettings) -> dict[str, Estimate]:
    from rl_shift.ope import Estimate

    if settings.json is None or not Path(settings.json).is_file():
        return {}
    try:
        document = json.loads(Path(settings.json).read_text(encoding="utf-8"))
        if document["settings"] != _fixed(settings):
            raise UserError(
                f"{settings.json} holds estimates with other settings: choose another --json"
            )
        names = Estimate.__dataclass_fields__
        return {
            row["policy"]: Estimate(**{name: row[name] for name in names})
            for row in document["policies"]
        }
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{settings.json} is no file of this command: choose another") from error


def _write(
    settings: OpeSettings, rows: Sequence[Mapping[str, Any]], verdicts: Mapping[str, Any]
) -> None:
    from rl_shift.runs import write

    document = {
        "format": 1,
        "settings": _fixed(settings),
        "policies": list(rows),
        "judgements": dict(verdicts),
    }
    write(Path(str(settings.json)), json.dumps(document, indent=1) + "\n")
