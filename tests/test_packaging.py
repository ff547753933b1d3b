"""The traps of mapping top-level folders to `rl_shift.*`; the wheel itself: scripts/test_wheel."""

import shutil
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import rl_shift

ROOT = Path(__file__).parents[1]
LINKS = ("agents", "configs", "envs")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_folder_is_listed(project: dict[str, Any]) -> None:
    """A sub-package missing from the list would silently miss the wheel."""
    found = set()
    for folder in ("rl_shift", *LINKS):
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT)
            if any((ROOT / part).is_symlink() for part in (inner, *inner.parents)):
                continue  # the same files, seen through the link
            found.add(".".join(inner.parts if folder == "rl_shift" else ("rl_shift", *inner.parts)))
    setuptools = project["tool"]["setuptools"]
    assert found == set(setuptools["packages"])
    assert set(setuptools["package-dir"]) == found


def test_every_data_file_is_listed(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        for path in (ROOT / folder).iterdir():
            if path.is_file() and path.suffix != ".py" and not path.name.startswith("."):
                matched = any(path.match(pattern) for pattern in patterns.get(package, ()))
                assert matched, f"{path} would miss the wheel: add it to package-data of {package}"


@pytest.mark.parametrize("name", LINKS)
def test_links_are_relative(name: str) -> None:
    link = ROOT / "rl_shift" / name
    if not link.is_symlink():
        pytest.skip("a checkout without symbolic links")
    assert link.readlink() == Path("..") / name


@pytest.mark.parametrize("name", LINKS)
def test_importing_a_folder_by_its_bare_name_is_banned(name: str) -> None:
    """From the root, `import agents.x` works too and gives a second class object."""
    flagged = f"import {name}.x\nfrom {name} import y\n"
    allowed = f"import rl_shift.{name}.x\nfrom rl_shift.{name} import y\nfrom rl_shift import z\n"
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "-"]
    for text, count in ((flagged, 2), (allowed, 0)):
        done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.count(f"TID251 `{name}` is banned") == count, done.stdout + done.stderr


def test_reexports_are_lazy_and_complete() -> None:
    assert set(rl_shift._ORIGIN) == set(rl_shift.__all__) - {"__version__"}
    for name in rl_shift.__all__:
        assert getattr(rl_shift, name) is not None
    assert set(rl_shift.__all__) <= set(dir(rl_shift))
    with pytest.raises(AttributeError, match="no_such_name"):
        rl_shift.no_such_name  # noqa: B018


def test_version_is_the_projects(project: dict[str, Any]) -> None:
    assert rl_shift.__version__ == project["project"]["version"]


def test_development_pins_agree(project: dict[str, Any]) -> None:
    pins = project["dependency-groups"]["dev"]
    assert project["project"]["optional-dependencies"]["dev"] == pins
    assert all("==" in pin for pin in pins)


def test_every_extra_of_the_design_is_declared(project: dict[str, Any]) -> None:
    assert set(project["project"]["optional-dependencies"]) == {
        "minari", "d4rl", "report", "video", "optuna", "ray", "export", "robotics", "metaworld",
        "dev",
    }  # fmt: skip


def test_presets_are_found_as_resources() -> None:
    names = [entry.name for entry in files("rl_shift.configs").iterdir()]
    assert "td3_bc.gym_mujoco.yaml" in names


def test_a_checkout_without_links_works_when_installed_editable(tmp_path: Path) -> None:
    """A link that became a text file (Windows) is ignored by import; the map takes over."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.hdf5", "*.egg-info")
    for name in ("rl_shift", *LINKS):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in LINKS:
        link = copy / "rl_shift" / name
        link.unlink()
        link.write_text(f"../{name}")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy / name)
    site = tmp_path / "site"
    site.mkdir()
    # what pip does for `pip install -e`, without its own environment and network
    build = (
        "import sys, setuptools.build_meta as b; print(b.build_editable(sys.argv[1]))"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", build, str(site)], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [wheel] = site.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    code = (
        "import site, sys; sys.meta_path[:] = [f for f in sys.meta_path if "
        "'editable' not in str(f).lower()]; site.addsitedir(sys.argv[1]); "
        "import rl_shift, rl_shift.agents, rl_shift.configs, rl_shift.envs; "
        "from rl_shift import agents, config; "
        "print(rl_shift.__file__, agents.get('td3_bc').__name__, *config.presets())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert str(copy) in done.stdout
    assert "TD3BC" in done.stdout
    assert "td3_bc.gym_mujoco" in done.stdout
