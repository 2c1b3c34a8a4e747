"""A digest of the code that a run goes by: this package's, and that of a third party's system."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import tidegate
from tidegate.systems.registry import make_system, named
from tidegate.systems.system import System

INSTALLED = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
KNOWN = sys.stdlib_module_names | {"tidegate"}
"""Packages that need no look: Python's stays as it is, and ours counts as a whole."""


@cache
def code_digest(system: str, split: tuple[int, int] | None = None) -> str:
    """Return a digest of all code that a run of ``system`` goes by, of this package where that is empty.

    It covers every file of this package, of the packages (or single files) that the system, its policies and
    its order come from, and of what those import, lazily or not. What is installed counts only where a part
    of the system comes from it.
    """
    found = hashlib.sha256()
    made = make_system(system, split=split) if system else None
    for path in sorted({*_under(Path(tidegate.__file__).parent), *_files(_roots(system, made))}):
        found.update(path.read_bytes())
    return found.hexdigest()


def _roots(name: str, made: System | None) -> set[str]:
    """Return the modules that a system's factory and its parts come from."""
    if made is None:
        return set()
    parts = (getattr(made, each.name) for each in fields(made))
    return set(map(_module_name, (named(name)[0], *parts, *made.controllers, *made.observers)))


def _module_name(part: Any) -> str:
    while isinstance(part, partial):
        part = part.func
    return getattr(part, "__module__", None) or ""


def _files(roots: Iterable[str]) -> set[Path]:
    """Return the files of the modules called ``roots``, and of what they import."""
    found: set[Path] = set()
    ahead = [path for root in roots for path in _of_module(root)]
    while ahead:
        path = ahead.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            ahead += [
                each
                for name in _imported(path)
                for each in _of_module(name)
                if not str(each).startswith(INSTALLED)
            ]
    return found


def _of_module(name: str) -> Iterator[Path]:
    """Yield the files of a module's package, or its only one; none of what is known.

    The module of a system that is named by its file is called by its path.
    """
    top = name if Path(name).is_absolute() else name.partition(".")[0]
    if not top or top in KNOWN:
        return
    module: ModuleType | None = sys.modules.get(top)
    spec = None if module is None else module.__spec__
    with suppress(ImportError, ValueError):
        spec = spec or find_spec(top)
    if spec is None:
        return
    if spec.submodule_search_locations:
        for folder in spec.submodule_search_locations:
            yield from _under(Path(folder))
    elif spec.has_location and spec.origin:
        yield Path(spec.origin)


def _under(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _imported(path: Path) -> Iterator[str]:
    """Yield the top-level packages that a file imports anywhere in it. Its own package is there."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # nobody has imported it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0]
