"""The agents, one file each; the file's name is the agent's name.

Files are only imported when asked for, so listing the names leaves torch alone.
"""

from __future__ import annotations

import ast
import pkgutil
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rl_shift.errors import UserError, nearest

if TYPE_CHECKING:
    from rl_shift.agent import Agent

ENTRY_POINT_GROUP = "rl_shift.agents"


def names() -> list[str]:
    """All names that `get` knows: our files, and entry points of other packages."""
    return sorted({*_files(), *_entry_points()})


def get(name: str) -> type[Agent]:
    """Imports an agent class by name, or by "module:Class" for one of the user's own."""
    if ":" in name:
        return _from_module(name)
    if name in _files():
        return _class_of_file(import_module(f"{__name__}.{name}"), name)
    if name in _entry_points():
        return _checked(_entry_points()[name].load(), f"entry point {name!r}")
    raise UserError(
        f"unknown agent {name!r}{nearest(name, names())}; the agents are {', '.join(names())}; "
        "your own is named module:Class"
    )


def summary(name: str) -> str:
    """First line of the agent file's docstring, read without importing the file."""
    spec = find_spec(f"{__name__}.{name}") if name in _files() else None
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _files() -> list[str]:
    found = pkgutil.iter_modules(__path__)
    return [entry.name for entry in found if not entry.ispkg and not entry.name.startswith("_")]


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def _from_module(spec: str) -> type[Agent]:
    module_name, _, class_name = spec.partition(":")
    try:
        module = import_module(module_name)
    except SyntaxError as error:
        place = f"{error.filename}, line {error.lineno}"
        raise UserError(f"agent {spec!r} cannot be read: {error.msg} ({place})") from error
    except (ModuleNotFoundError, ValueError) as error:
        # A module missing inside the user's own file is that file's error, not a wrong name.
        missing = getattr(error, "name", None)
        if missing is not None and not f"{module_name}.".startswith(f"{missing}."):
            raise
        raise UserError(
            f"no module named {module_name!r} (agent {spec!r}); install it or start in its folder"
        ) from error
    if not hasattr(module, class_name):
        raise UserError(
            f"module {module_name!r} has no class {class_name!r}"
            f"{nearest(class_name, vars(module))} (agent {spec!r})"
        )
    return _checked(getattr(module, class_name), f"{spec!r}")


def _class_of_file(module: ModuleType, name: str) -> type[Agent]:
    """The class called like the file, else the only Agent defined in it."""
    from rl_shift.agent import Agent

    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Agent)
        and value.__module__ == module.__name__
    ]
    same = [cls for cls in own if _folded(cls.__name__) == _folded(name)]
    if len(same) == 1:
        return same[0]
    if len(own) == 1:
        return own[0]
    raise UserError(
        f"agent file {module.__file__} must define one Agent class, or one called like the file; "
        f"it defines {', '.join(cls.__name__ for cls in own) or 'none'}"
    )


def _checked(value: object, where: str) -> type[Agent]:
    from rl_shift.agent import Agent

    if isinstance(value, type) and issubclass(value, Agent):
        return value
    raise UserError(f"{where} is not a class deriving from rl_shift.agent.Agent")


def _folded(name: str) -> str:
    return name.replace("_", "").lower()
