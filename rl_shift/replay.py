"""Turn the replay buffer of a trained online run into a dataset: whole episodes, evenly thinned."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rl_shift import __version__, checkpoint, runs
from rl_shift.buffer import Buffer, transition_spec
from rl_shift.envs import make_env
from rl_shift.errors import UserError
from rl_shift.recording import write_hdf5

Rows = dict[str, np.ndarray]


def record_replay(
    run_dir: str | Path, out: str | Path, rows: int, origin: str, compression: str | None = "gzip"
) -> Path:
    """Write about `rows` transitions of a run's replay buffer in D4RL's v2 layout.

    Episodes are kept whole and picked at equal distances over the life of the run, so the file
    shows the policy's whole way from random to trained.

    Args:
        run_dir: a run with one online task, its last checkpoint holding the ring buffer.
        out: the file to write; an existing one is replaced.
        rows: upper bound of the number of transitions.
        origin: where the data comes from, kept in the file.
        compression: an HDF5 filter.

    Raises:
        UserError: the run has no replay buffer, or one that no episode of which fits.
    """
    agent, run, tasks = runs.load_agent(run_dir)
    state, _ = checkpoint.load(checkpoint.latest(Path(run_dir)))
    task = tasks[-1]
    if state["ring"] is None or task.env is None:
        raise UserError(f"{run_dir} holds no replay buffer: give a run with env steps")
    spec = transition_spec(agent.observation_space, agent.action_space)
    buffer = Buffer(
        spec, agent.buffer_capacity, run.lanes, seeds=tuple(state["ring"]["seeds"]), stream="ring"
    )
    buffer.load_state(state["ring"])
    data = _episodes_in_order(buffer)
    ends = np.flatnonzero(data["terminated"] | data["truncated"]) + 1
    if not len(ends):
        raise UserError(
            f"the replay buffer of {run_dir} holds no finished episode: train it longer"
        )
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    every = max(1.0, lengths.sum() / rows)
    chosen = np.arange(len(ends))
    while lengths[chosen].sum() > rows:  # long episodes come late
        chosen = np.unique(np.floor(np.arange(0, len(ends), every)).astype(int))
        every *= 1.02
        if len(chosen) == 1 and lengths[chosen].sum() > rows:
            raise UserError(f"no episode of {run_dir} fits into {rows} rows: raise the number")
    spans = zip(starts[chosen].tolist(), ends[chosen].tolist(), strict=True)
    index = np.concatenate([np.arange(a, b) for a, b in spans])
    env = make_env(task.env)
    horizon = env.spec.max_episode_steps if env.spec is not None else None
    env.close()
    attributes = {
        "env_id": task.env,
        "origin": origin,
        "agent": run.agent_name,
        "env_steps": state["clock"]["total_env_steps"],
        "seed": run.seed,
        "rl_shift": __version__,
    }
    if horizon is not None:
        attributes["horizon"] = horizon
    if task.reference_scores is not None:
        attributes["reference_min"], attributes["reference_max"] = task.reference_scores
    names = {
        "obs": "observations",
        "action": "actions",
        "reward": "rewards",
        "next_obs": "next_observations",
        "terminated": "terminals",
        "truncated": "timeouts",
    }
    arrays = {name: data[key][index] for key, name in names.items()}
    return write_hdf5(out, arrays, attributes, compression)


def _episodes_in_order(buffer: Buffer) -> Rows:
    """The rows of all lanes, lane after lane, each in time order; unfinished episodes dropped."""
    batch = buffer.latest(len(buffer) // buffer.lanes)
    lanes = [{k: v[lane].cpu().numpy() for k, v in batch.items()} for lane in range(buffer.lanes)]
    finished = []
    for lane in lanes:
        ends = np.flatnonzero(lane["terminated"] | lane["truncated"])
        finished.append({k: v[: ends[-1] + 1 if len(ends) else 0] for k, v in lane.items()})
    return {k: np.concatenate([lane[k] for lane in finished]) for k in finished[0]}
