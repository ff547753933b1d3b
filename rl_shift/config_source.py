"""An agent's Config without its algorithm: what `--help` shows needs no torch.

The agent's file is read, not imported: only its Config, what that inherits, constants and imports
of the standard library are executed. Our design.
"""

from __future__ import annotations
import __future__

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any


def config_class(agent: str) -> type | None:
    """The Config of one of our agents; None where the file alone does not tell.

    Fields, defaults, types and source lines are those of the real class, which tests compare.

    Args:
        agent: a name from `rl_shift.agents`; one of a user's own gives None.
    """
    try:
        module = _bare(f"rl_shift.agents.{agent}")
    except Exception:  # whatever such a file does that needs more: the real one is imported then
        return None
    own = [
        found
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == module.__name__
    ]
    same = [kind for kind in own if kind.__name__.lower() == agent.replace("_", "")]
    kind = next(iter(same or own), None)
    return getattr(kind, "Config", None)


def _bare(name: str) -> ModuleType:
    """The module with nothing but classes that hold a Config, and what a Config may mention."""
    known = sys.modules.get(f"{__name__}.{name}")
    if known is not None:
        return known
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    module = ModuleType(f"{__name__}.{name}")
    module.__file__ = spec.origin  # where comments behind the fields are read
    sys.modules[module.__name__] = module
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rl_shift"):
            _take(node, module)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if _is_standard(node):
                _run(node, module)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            _run(node, module)
        elif isinstance(node, ast.ClassDef):
            inner: list[ast.stmt] = [
                n for n in node.body if isinstance(n, ast.ClassDef) and n.name == "Config"
            ]
            node.bases = [base for base in node.bases if ast.unparse(base) in vars(module)]
            node.keywords, node.decorator_list = [], []
            node.body = inner or [ast.Pass()]
            _run(node, module, needed=bool(inner))
    return module


def _take(node: ast.ImportFrom, module: ModuleType) -> None:
    """Agent classes and aliases such as `Mode = Literal[...]`, from bare modules as well."""
    agent = str(node.module).startswith("rl_shift.agents.")
    if not agent and not any(alias.name.istitle() for alias in node.names):
        return
    source: Any = _bare(str(node.module))
    for alias in node.names:
        if hasattr(source, alias.name):
            setattr(module, alias.asname or alias.name, getattr(source, alias.name))


def _is_standard(node: ast.Import | ast.ImportFrom) -> bool:
    names = [str(node.module)] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
    return all(name.partition(".")[0] in sys.stdlib_module_names for name in names)


def _run(node: ast.stmt, module: ModuleType, needed: bool = False) -> None:
    """Execute one statement; one that needs something else is left out, unless it is needed."""
    tree = ast.fix_missing_locations(ast.Module([node], []))
    flags = __future__.annotations.compiler_flag  # as in the file itself
    code = compile(tree, str(module.__file__), "exec", flags, dont_inherit=True)
    try:
        exec(code, vars(module))
    except Exception:
        if needed:
            raise
