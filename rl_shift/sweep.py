"""The command `sweep`: many runs from one grid file, each resumable, none stopping the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rl_shift import config, grid
from rl_shift.errors import UserError
from rl_shift.grid import Planned
from rl_shift.options import Parser, UnfilledHelp, options_of, split

if TYPE_CHECKING:
    from rl_shift.estimate import Work
    from rl_shift.launcher import Launcher

USAGE = "rl-shift sweep GRID.yaml [options]"
TEXT = """Trains every combination of a grid file: agents x datasets x overrides, several seeds
each. Finished runs are skipped and stopped ones go on, so the same command continues a sweep; a
run that fails is listed at the end with its error. A grid file:

agents: [AGENT, {agent: module:Class, preset: PRESET, seeds: 1}]
datasets: [hopper-medium-v2, data/own.hdf5]
seeds: 3
settings: {updates: 20000, eval_every: 5000}
overrides: {agent.batch_size: [256, 1024]}

With `search: {trials: 20, space: {agent.learning_rate: {low: 1e-5, high: 1e-3, log: true}}}` Optuna
proposes values instead, the mean last score of an entry's runs being the goal."""


@dataclass(frozen=True)
class SweepSettings:
    """Flags of `rl-shift sweep`."""

    out: str | None = None  # folder of the run folders; default: sweeps/GRID
    processes: int | None = None  # runs at a time; default: usable cores / threads of a run
    dry_run: bool = False  # print the plan and the estimate, start nothing
    estimate: bool = True  # measure speeds that no earlier run of this sweep tells
    backend: Literal["local", "ray"] = "local"  # ray: trials of Ray Tune, see --address
    address: str | None = None  # of a running Ray cluster; default: Ray on this machine alone
    retries: int = 1  # ray: of a run whose process was killed or whose machine was lost


def sweep(argv: list[str]) -> int:
    """`rl-shift sweep`."""
    switches = ("--help", "-h", "--dry-run", "--estimate")
    words, flags = split(argv, switches)
    parser = Parser(
        options_of(SweepSettings), usage=USAGE, description=TEXT, formatter_class=UnfilledHelp
    )
    if {"--help", "-h"} & set(flags):
        parser.parser.print_help()
        return 0
    if len(words) != 1:
        raise UserError(f"give one grid file, not {len(words)}: {USAGE}")
    settings = SweepSettings(**(parser.defaults() | parser.flags(flags)))
    if settings.processes is not None and settings.processes < 1:
        raise UserError(f"--processes must be at least 1, not {settings.processes}")
    if settings.retries < 0:
        raise UserError(f"--retries must not be negative, not {settings.retries}")
    if settings.address is not None and settings.backend != "ray":
        raise UserError("--address is of a Ray cluster: give --backend ray as well")
    out = Path(settings.out) if settings.out else Path("sweeps", Path(words[0]).stem)
    planned, wanted = grid.read(words[0]), grid.search_of(words[0])
    if wanted is not None:
        return _search(planned, wanted, words[0], out, settings)
    return Sweep(planned, out, settings).run()


def _launcher(settings: SweepSettings) -> AbstractContextManager[Launcher]:
    """The backend that was asked for."""
    if settings.backend == "ray":
        from rl_shift.ray_launcher import RayTune

        return RayTune(settings.processes, settings.address, settings.retries)
    from rl_shift.launcher import Local

    return Local(settings.processes)


def _search(
    planned: Sequence[Planned],
    wanted: Mapping[str, Any],
    where: str,
    out: Path,
    settings: SweepSettings,
) -> int:
    """Train what Optuna proposes; 1 if a run failed."""
    from rl_shift import checkpoint, search
    from rl_shift.launch_view import View, told
    from rl_shift.launcher import wait

    goal = search.parsed(wanted, where)
    groups: dict[str, list[Planned]] = {}
    for plan in planned:
        groups.setdefault(plan.entry, []).append(plan)
    print(f"search {out}: {goal.trials} trials of each of {', '.join(groups)}", flush=True)
    if settings.dry_run:
        return 0
    with ExitStack() as stack:
        stack.enter_context(checkpoint.Lock(out))
        searching = search.Searching(groups, goal, out)
        view = View(out.name)
        stack.callback(view.close)
        pool = stack.enter_context(_launcher(settings))
        searching.begin(pool)
        reports = wait(pool, view, searching.ended(pool))
    print("\n".join(searching.table()))
    if any(report.state == "stopped" for report in reports):
        raise KeyboardInterrupt("stopped and saved; the same command goes on")
    failed = [report for report in reports if report.state == "failed"]
    for report in failed:
        print(f"  {told(report)}")
    return 1 if failed else 0


class Sweep:
    """The runs of a grid in one folder.

    Args:
        planned: what to train.
        out: where the run folders are.
        settings: how.
    """

    def __init__(self, planned: Sequence[Planned], out: Path, settings: SweepSettings) -> None:
        """Refuses folders that hold other runs."""
        from rl_shift import separate_seeds

        self.out, self.settings = out, settings
        self.planned = [grid.placed(plan, out) for plan in planned]
        for plan in self.planned:
            _check_same(plan, out / plan.name)
        self.jobs = {
            plan.name: [
                replace(job, name=plan.name if job.name == plan.name else f"{plan.name}/{job.name}")
                for job in separate_seeds.jobs(plan.run, out / plan.name)
            ]
            for plan in self.planned
        }

    def run(self) -> int:
        """Check, estimate, train, and report; 1 if something failed."""
        from rl_shift import estimate
        from rl_shift.launcher import has_checkpoint, usable_cores
        from rl_shift.separate_seeds import finished

        todo = [job for jobs in self.jobs.values() for job in jobs if not finished(job)]
        begun = sum(has_checkpoint(job.folder) for job in todo)
        total = sum(map(len, self.jobs.values()))
        print(
            f"sweep {self.out}: {len(self.planned)} runs, {total} processes in all: "
            f"{total - len(todo)} finished, {begun} to go on with, {len(todo) - begun} new",
            flush=True,
        )
        names = {job.name for job in todo}
        works = self._checked(names)
        if works:
            past = estimate.past_speeds(
                job.folder for jobs in self.jobs.values() for job in jobs if job.folder.is_dir()
            )
            room = usable_cores() // max(job.run.threads for job in todo)
            processes = min(self.settings.processes or max(1, room), len(todo))
            costs = estimate.costs(
                works, past, self.settings.estimate, lambda text: print(text, flush=True)
            )
            print("\n".join(estimate.table(costs, processes)), flush=True)
        if self.settings.dry_run:
            for plan in self.planned:
                left = sum(job.name in names for job in self.jobs[plan.name])
                print(f"{plan.name}: {f'{left} to train' if left else 'finished'}")
            return 0
        if not names:
            print("every run is finished")
            return 0
        return self._train(names)

    def _checked(self, names: set[str]) -> list[Work]:
        """The size of every job; data, environments and spaces are looked at on the way."""
        from rl_shift import estimate, runs

        works = []
        for plan in self.planned:
            open_jobs = [job for job in self.jobs[plan.name] if job.name in names]
            if not open_jobs:
                continue
            try:
                tasks = runs.resolve(plan.run)
                agent = runs.make_agent(replace(plan.run, seeds=1, device="cpu"), tasks)
            except UserError as error:
                raise UserError(f"{plan.name}: {error}") from error
            works += [estimate.work(job, agent, tasks) for job in open_jobs]
        return works

    def _train(self, names: set[str]) -> int:
        from rl_shift import checkpoint, runs, separate_seeds
        from rl_shift.launch_view import View, told
        from rl_shift.launcher import Report, wait

        apart = [plan for plan in self.planned if separate_seeds.apart(plan.run)]
        owner = {job.name: plan for plan in apart for job in self.jobs[plan.name]}
        done: list[Report] = []

        def merge(report: Report) -> None:
            done.append(report)
            plan = owner.get(report.job.name)
            if plan is not None:
                own = self.jobs[plan.name]
                mine = [r for r in done if r.job in own]
                whole = len(mine) == sum(job.name in names for job in own)
                separate_seeds.write_merged(self.out / plan.name, own, mine if whole else [])

        with ExitStack() as stack:
            stack.enter_context(checkpoint.Lock(self.out))
            for plan in apart:
                stack.enter_context(checkpoint.Lock(self.out / plan.name))
                runs.write(self.out / plan.name / runs.CONFIG, config.dump(plan.run))
            view = View(self.out.name)
            stack.callback(view.close)
            pool = stack.enter_context(_launcher(self.settings))
            for jobs in self.jobs.values():
                for job in jobs:
                    if job.name in names:
                        pool.submit(job)
            reports = wait(pool, view, merge)
        if any(report.state == "stopped" for report in reports):
            raise KeyboardInterrupt("stopped and saved; the same command goes on")
        failed = [report for report in reports if report.state == "failed"]
        print(f"{len(reports) - len(failed)} finished, {len(failed)} failed; runs: {self.out}")
        for report in failed:
            print(f"  {told(report)}")
        return 1 if failed else 0


def _check_same(plan: Planned, folder: Path) -> None:
    """A folder that holds a run must hold this one, or a shorter one."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    there = config.load(path)
    before, after = there.tasks[-1], plan.run.tasks[-1]
    longer = after.updates >= before.updates and after.env_steps >= before.env_steps
    if longer and len(there.tasks) == len(plan.run.tasks):
        last = replace(before, updates=after.updates, env_steps=after.env_steps)
        there = replace(there, tasks=(*there.tasks[:-1], last))
    if there != plan.run:
        old, new = (config.dump(run).splitlines() for run in (there, plan.run))
        changed = [line.strip() for line in old if line not in new]
        raise UserError(
            f"{folder} holds a run with other settings ({', '.join(changed[:3]) or 'fewer'} there):"
            " remove it, or choose another --out"
        )
