"""Rooms whose names are imported when they are used, because not everyone has the packages behind them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    room: str, modules: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that re-exports names without importing their modules.

    A name must not be that of a module of the room: importing the module would take its place.

    Args:
        room: the package, `__name__` in its `__init__.py`.
        modules: the names of each module, the module relative to the room.
    """
    places = {name: f"{room}.{module}" for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        return getattr(importlib.import_module(places[name]), name)

    def names() -> list[str]:
        return sorted(places)

    return get, names
