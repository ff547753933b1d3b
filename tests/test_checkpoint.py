"""Checkpoints: exact round trips, atomic writes, refusals, and the lock of a run folder."""

import errno
import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from rl_shift import checkpoint, lock, state_tree
from rl_shift.errors import UserError

META = {"device": "cpu", "precision": "highest", "compile": "off"}
FILES = ["weights.safetensors", "train_state.safetensors", "train_state.json"]


def state(step: int = 0) -> dict:
    """A small state of the shape that a trainer saves."""
    return {
        "agent": {
            "module": {"actor.0.weight": torch.full((2, 3), float(step)), "actor.0.bias": None},
            "optimizers": {"actor": {0: {"exp_avg": torch.ones(3) * step}}},
            "updates": step,
        },
        "clock": (0, "offline", step),
    }


def same(a: object, b: object) -> bool:
    """Equal in value, type and, for tensors and arrays, shape and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a, math.copysign(1, a)) == (
            b,
            math.copysign(1, b),
        )
    return a == b


def round_trip(folder: Path, value: dict) -> dict:
    return checkpoint.load(checkpoint.save(folder, value, "a: 1\n", META))[0]


def reseal(folder: Path) -> None:
    """Make the check sums fit what a test wrote into the folder."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = {name: checkpoint._fingerprint(folder / name) for name in FILES}
    (folder / "meta.json").write_text(json.dumps(meta))


# ---- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]
    + [torch.uint8, torch.bool, torch.complex64],
)
def test_tensor_types(tmp_path, dtype):
    values = {"x": torch.tensor([[1, 0, 3]], dtype=dtype), "scalar": torch.tensor(1, dtype=dtype)}
    values["empty"] = torch.zeros((0, 4), dtype=dtype)
    assert same(round_trip(tmp_path / "c", values), values)


def test_numpy(tmp_path):
    generator = np.random.default_rng(3)
    generator.normal(size=5)
    values = {
        "bits": generator.bit_generator.state,  # 128-bit integers
        "twister": np.random.MT19937(1).state,
        "matrix": np.arange(6.0).reshape(2, 3).T,
        "wide": np.array([2**63], np.uint64),
        "foreign_order": np.array([1, 2], ">f4"),
        "no_axis": np.array(7, np.int16),
        "flag": np.bool_(True),
        "number": np.float64(0.1),
        "small": np.float32(0.1),
    }
    values["matrix"].flags.writeable = False
    assert same(round_trip(tmp_path / "c", values), values)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.just("$tuple") | st.integers(), inner)
    ),
    max_leaves=8,
)


@given(value=PLAIN)
@settings(max_examples=100, deadline=None)
def test_plain_values(value):
    encoded = state_tree.Encoder().encode(value)
    assert same(state_tree.decode(json.loads(json.dumps(encoded, allow_nan=False)), {}), value)


def test_plain_values_through_files(tmp_path):
    values = {"inf": [-math.inf, math.nan, -0.0], "$tuple": (1, (2,)), 7: {"a": 2**200}, "é": ""}
    assert same(round_trip(tmp_path / "c", values), values)


def test_shared_and_strided_tensors(tmp_path):
    storage = torch.arange(12.0)
    parameter = torch.nn.Parameter(storage.clone())
    values = {
        "agent": {"module": {"tied.a": parameter, "tied.b": parameter}},
        "rows": storage.view(3, 4)[1:],
        "columns": storage.view(3, 4).T,
        "expanded": torch.ones(1).expand(4),
        "halves": list(storage.chunk(2)),
        "a/b": torch.tensor(1.0),
        "a": {"b": torch.tensor(2.0)},
        "__metadata__": torch.tensor(3.0),
    }
    loaded = round_trip(tmp_path / "c", values)
    assert torch.equal(loaded["agent"]["module"]["tied.b"], parameter)
    loaded["agent"] = values["agent"]  # a Parameter comes back as a plain tensor
    assert same(loaded, values)
    loaded["rows"].add_(1)  # memory of its own
    assert torch.equal(loaded["columns"], values["columns"])


def test_weights_are_named_as_in_the_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    folder = checkpoint.save(tmp_path / "c", {"agent": {"module": module.state_dict()}}, "", META)
    fresh = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    fresh.load_state_dict(load_file(folder / "weights.safetensors"))
    assert same(dict(fresh.state_dict()), dict(module.state_dict()))


def test_the_folder(tmp_path):
    folder = checkpoint.save(tmp_path / "deep" / "c", state(), "seed: 3\n", META)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, "config.yaml", "meta.json"])
    assert (folder / "config.yaml").read_text() == "seed: 3\n"
    meta = checkpoint.load(folder)[1]
    assert META.items() <= meta.items()
    assert meta["format"] == checkpoint.FORMAT
    assert meta["versions"]["torch"] == torch.__version__


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [Path("x"), {1, 2}, object(), torch.device("cpu"), np.array([None]), {(1, 2): 3}]
    + [torch.eye(2).to_sparse(), torch.float32, b"bytes", range(3)],
    ids=lambda value: type(value).__name__,
)
def test_foreign_objects_are_not_saved(tmp_path, value):
    with pytest.raises(UserError, match="'agent/extra/1'"):
        checkpoint.save(tmp_path / "c", {"agent": {"extra": [0, value]}}, "", META)
    assert not list(tmp_path.iterdir())


def test_foreign_objects_are_not_loaded(tmp_path):
    folder = checkpoint.save(tmp_path / "c", state(), "", META)
    path = folder / "train_state.json"
    path.write_text(json.dumps({"agent": {"extra": {"$object": "os.system"}}}))
    reseal(folder)
    with pytest.raises(UserError, match=r"\$object.*agent/extra"):
        checkpoint.load(folder)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickles_are_not_loaded(tmp_path, file, how):
    folder = checkpoint.save(tmp_path / "c", state(), "", META)
    if how == "torch":
        torch.save({"trap": Trap(tmp_path / "sprung")}, folder / file)
    else:
        (folder / file).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    reseal(folder)
    with pytest.raises(UserError, match=file):
        checkpoint.load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "empty"])
def test_damage_is_named(tmp_path, file, damage):
    folder = checkpoint.save(tmp_path / "c", state(), "", META)
    content = bytearray((folder / file).read_bytes())
    if damage == "flip":
        content[-2] ^= 1
    else:
        content = content[: 0 if damage == "empty" else -3]
    (folder / file).write_bytes(content)
    if damage == "gone":
        (folder / file).unlink()
    with pytest.raises(UserError, match=rf"damaged.*{file}.*delete.*checkpoint before it"):
        checkpoint.load(folder)


def test_structure_that_names_a_missing_tensor(tmp_path):
    folder = checkpoint.save(tmp_path / "c", state(), "", META)
    (folder / "train_state.json").write_text('{"x": {"$tensor": "weights.safetensors:y"}}')
    reseal(folder)
    with pytest.raises(UserError, match=r"damaged.*train_state\.json"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_damaged_meta(tmp_path, content):
    folder = checkpoint.save(tmp_path / "c", state(), "", META)
    (folder / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"damaged.*meta\.json"):
        checkpoint.load(folder)


def test_unknown_format_names_both_versions(tmp_path):
    folder = checkpoint.save_step(tmp_path, 1, state(), "", META)
    meta = json.loads((folder / "meta.json").read_text())
    meta["format"] = 99
    (folder / "meta.json").write_text(json.dumps(meta))
    assert checkpoint.latest(tmp_path) == folder
    with pytest.raises(UserError, match=r"format 99.*reads format 1"):
        checkpoint.load(folder)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint: it has no meta\.json"):
        checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        checkpoint.latest(tmp_path)


# ---- atomic writes ---------------------------------------------------------------------------


def test_keeps_the_last(tmp_path):
    for step in (5, 10, 1_000_000_000, 20):
        saved = checkpoint.save_step(tmp_path, step, state(step), "", META, keep=2)
        assert saved.is_dir()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    # the newest by number stay, and what was just written always does
    assert names == ["step_000000020", "step_1000000000"]
    assert checkpoint.latest(tmp_path).name == "step_1000000000"


def test_latest_passes_over_the_damaged_and_says_so(tmp_path, caplog):
    whole = checkpoint.save_step(tmp_path, 1, state(1), "", META)
    later = checkpoint.save_step(tmp_path, 2, state(2), "", META)
    (later / FILES[0]).unlink()
    folder = tmp_path / "checkpoints"
    (folder / "step_000000003").mkdir()
    (folder / ".tmp-step_000000004-17").mkdir()
    (folder / "step_x").mkdir()
    (folder / "notes.txt").write_text("")
    assert checkpoint.latest(tmp_path) == whole
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("damaged" in line and "step_000000001" in line for line in said)
    checkpoint.save_step(tmp_path, 5, state(5), "", META)
    assert not list(folder.glob(".tmp*"))


def test_saving_over_a_checkpoint(tmp_path):
    for value in (1, 2):
        folder = checkpoint.save(tmp_path / "c", state(value), "", META)
    assert same(checkpoint.load(folder)[0], state(2))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, code, call):
    checkpoint.save_step(tmp_path, 1, state(1), "", META, keep=1)

    def fail(*_args, **_options):
        raise OSError(code, os.strerror(code))

    for step in (1, 2):  # over the old one, and beside it
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(UserError, match=rf"step_.*{os.strerror(code)}.*intact"):
                checkpoint.save_step(tmp_path, step, state(step + 1), "", META, keep=1)
        assert os.listdir(tmp_path / "checkpoints") == ["step_000000001"]
        assert same(checkpoint.load(checkpoint.latest(tmp_path))[0], state(1))


def test_a_disk_that_takes_no_more_bytes(tmp_path):
    resource = pytest.importorskip("resource")
    checkpoint.save_step(tmp_path, 1, state(1), "", META, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(UserError, match=f"{os.strerror(errno.EFBIG)}.*intact"):
            checkpoint.save_step(tmp_path, 2, {"big": torch.zeros(10_000)}, "", META, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "checkpoints") == ["step_000000001"]


def test_an_interrupt_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_step(tmp_path, 1, state(1), "", META)
    assert not list((tmp_path / "checkpoints").iterdir())


KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
import torch
from rl_shift import checkpoint

os.fsync = lambda descriptor: None  # it guards against a power cut, which is not tested here

def state(step):
    return {"agent": {"module": {"w": torch.full((64,), float(step))}}, "step": step}

def killed_at(n, run_dir, step):
    '''Save in a child that dies of SIGKILL at its n-th call to the file system.'''
    child = os.fork()
    if child == 0:
        count = 0
        def dying(call):
            def wrapped(*args, **options):
                nonlocal count
                count += 1
                if count == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)
            return wrapped
        for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        checkpoint.save_step(run_dir, step, state(step), "", {}, keep=1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0

root, kills = Path(sys.argv[1]), 0
for case, target, stride in (("beside", 8, 3), ("over", 7, 1)):
    run_dir = root / case
    for n in range(1, 200, stride):
        checkpoint.save_step(run_dir, 7, state(7), "", {}, keep=1)
        finished = killed_at(n, run_dir, target)
        loaded = checkpoint.load(checkpoint.latest(run_dir))[0]
        assert loaded["step"] in (7, target), (case, n, loaded)
        assert (loaded["agent"]["module"]["w"] == loaded["step"]).all()
        checkpoint.save_step(run_dir, 9, state(9), "", {}, keep=1)  # a later save tidies up
        assert os.listdir(run_dir / "checkpoints") == ["step_000000009"], (case, n)
        checkpoint._remove(run_dir / "checkpoints" / "step_000000009")
        kills += not finished
        if finished:
            break
    assert finished
print(kills)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_every_step_of_a_save(tmp_path):
    script = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED_EVERYWHERE)]
    done = subprocess.run([*script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


# ---- lock ------------------------------------------------------------------------------------


def owner(**changes: object) -> str:
    return json.dumps(checkpoint.Lock(Path("."))._owner | changes)


def test_second_process_is_refused(tmp_path):
    with checkpoint.Lock(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on"):
            checkpoint.Lock(tmp_path / "run").__enter__()
    assert not list((tmp_path / "run").iterdir())
    with checkpoint.Lock(tmp_path / "run"):
        pass


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("content", ["dead", "reused", "", "[]", '{"pid": -1}', "{"])
def test_stale_lock_is_taken_over(tmp_path, content):
    if content == "dead":
        content = owner(pid=dead())
    elif content == "reused":  # the pid now belongs to another process: this one
        if not Path("/proc/self/stat").exists():
            pytest.skip("start times of processes are read from /proc")
        content = owner(start="another boot:1")
    (tmp_path / "lock").write_text(content)
    with checkpoint.Lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_zombie_holds_no_lock(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=-1)
    held = owner(pid=process.pid, start=lock._started(process.pid))
    (tmp_path / "lock").write_text(held)
    with pytest.raises(UserError, match=str(process.pid)):
        checkpoint.Lock(tmp_path).__enter__()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, not yet reaped
    with checkpoint.Lock(tmp_path):
        pass
    process.communicate()


def test_another_host_is_believed(tmp_path):
    (tmp_path / "lock").write_text(owner(host="elsewhere", pid=dead()))
    with pytest.raises(UserError, match="on elsewhere.*delete"):
        checkpoint.Lock(tmp_path).__enter__()


def test_only_one_takes_a_stale_lock_over(tmp_path):
    (tmp_path / "lock").write_text(owner(pid=dead()))
    won, start = [], threading.Barrier(8)

    def contend():
        start.wait()
        try:
            checkpoint.Lock(tmp_path).__enter__()
        except UserError:
            return
        won.append(1)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_release_spares_a_successor(tmp_path):
    with checkpoint.Lock(tmp_path):
        (tmp_path / "lock").write_text(owner(pid=1, host="elsewhere"))
    assert (tmp_path / "lock").exists()


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the run folder.*--run-dir"):
        checkpoint.Lock(tmp_path / "file" / "run").__enter__()
    with pytest.raises(UserError, match="cannot write the checkpoint"):
        checkpoint.save_step(tmp_path / "file", 1, state(), "", META)
