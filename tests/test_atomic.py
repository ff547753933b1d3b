"""Files are whole or absent."""

from pathlib import Path

import pytest

from rl_shift import atomic
from rl_shift.errors import UserError


def test_a_failed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    atomic.write_text(path, "old")
    with pytest.raises(RuntimeError), atomic.replacing(path) as partial:
        partial.write_text("half")
        assert partial.suffix == ".txt"
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "a.json", tmp_path):
        with pytest.raises(UserError, match="cannot write .*; choose another"):
            atomic.check_writable(target, "choose another")
    with pytest.raises(UserError, match="cannot write .*; make room"):
        atomic.write_text(tmp_path / "file" / "a.json", "", "make room")
    with pytest.raises(OSError):
        atomic.write_text(tmp_path / "file" / "a.json", "")
    atomic.check_writable(tmp_path / "fine.json", "")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
