"""Plug-ins on their way into a process: allowed by name, imported, and told apart by their source.

Nothing is imported that the caller of a run has not allowed: a recipe's `plugins` are only names.

Source: this project.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from rayfed_lora.errors import PluginError
from rayfed_lora.plugins.registry import (
    KEYS,
    TABLES,
    Choice,
    Decorated,
    Method,
    allow,
    allowed,
    method_of,
)

GROUP = "rayfed_lora.plugins"


@dataclass(frozen=True)
class Plugins:
    """Own methods that the caller of a run allows; unpickled in another process, they are imported.

    Attributes:
        modules: their names.
        folders: of those modules, for processes of the same machine that do not find them.
        objects: functions and classes of a notebook or script, each with what registers it.
    """

    modules: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    objects: tuple[tuple[Callable[[Any], Any], Any], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.modules, self.folders, self.objects)


def _arrived(
    modules: tuple[str, ...],
    folders: tuple[str, ...],
    objects: tuple[tuple[Callable[[Any], Any], Any], ...],
) -> Plugins:
    for folder in folders:
        if folder not in sys.path:
            sys.path.append(folder)
    for name in modules:
        _imported(name)
    for register, target in objects:
        register(target)
    return Plugins(modules, folders, objects)


def permit(things: Iterable[Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Import and register what the caller of a run allows.

    Args:
        things: names of modules, also in the working directory; modules; decorated functions and
            classes; the latter's instances and functions with options, which are chosen too.

    Returns:
        The names of the modules; the recipe's values by key path that choose methods.

    Raises:
        PluginError: a module cannot be imported, or a thing is no method.
    """
    names: list[str] = []
    chosen: dict[str, Any] = {}
    given: dict[tuple[str, str], Method[Any]] = {}
    for thing in things:
        if isinstance(thing, (str, ModuleType)):
            names.append(thing if isinstance(thing, str) else thing.__name__)
            continue
        method = thing.method if isinstance(thing, Choice) else _method(thing)
        if given.setdefault((method.kind, method.name), method) is not method:
            raise PluginError(f"plugins: expected one {method.kind} {method.name!r}, got two")
        # Another one of its name may have been made since.
        TABLES[method.kind].restore(method)
        if not method.by_value and not method.built_in:
            names.append(method.module)
        if isinstance(thing, Choice):
            chosen |= settings_of(method, thing.options)
        elif not isinstance(thing, (type, Decorated)):
            chosen |= settings_of(method, _fields(thing))
    names = [*dict.fromkeys(names)]
    # Not without need: what lies there could stand in for a package that is not installed.
    if names and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    for name in names:
        _imported(name)
    return tuple(names), chosen


def flags(modules: Sequence[str]) -> list[str]:
    """Return the words of a command that allow modules.

    >>> flags(("my_methods",))
    ['--plugins', 'my_methods']
    """
    return [word for name in modules for word in ("--plugins", name)]


def carried(modules: Sequence[str], methods: Iterable[Method[Any]]) -> Plugins:
    """Return what a recipe takes along to other processes.

    Args:
        modules: that it names.
        methods: that it chooses.
    """
    folders = dict.fromkeys(folder for name in modules if (folder := folder_of(name)))
    own = tuple((m.again, m.target) for m in methods if m.by_value)
    return Plugins(tuple(modules), tuple(folders), own)


def settings_of(method: Method[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's values by key path that choose a method with options."""
    key = str(getattr(method.value, "key", KEYS[method.kind]))
    if key.endswith(".name"):
        return {key.removesuffix(".name"): {"name": method.name, **options}}
    section = key.rpartition(".")[0]
    return {key: method.name, **{f"{section}.{name}": value for name, value in options.items()}}


def _fields(thing: Any) -> dict[str, Any]:
    """Return the options that an instance of a decorated class holds."""
    known = method_of(thing).options.model_fields  # type: ignore[union-attr]
    return {name: getattr(thing, name) for name in known}


def missing(wanted: Sequence[str]) -> list[str]:
    """Return the modules that this process may not import: neither allowed nor installed as such.

    An installed package allows the modules that its entry points of the group
    `rayfed_lora.plugins` name; these are imported here.
    """
    if not wanted:
        return []
    installed = {point.module for point in metadata.entry_points(group=GROUP)}
    for name in wanted:
        if name in installed:
            _imported(name)
    return [name for name in wanted if name not in allowed()]


def _imported(name: str) -> None:
    """Import a module and let recipes name its methods."""
    if name == "__main__":
        raise PluginError(
            "plugins: expected the methods of this notebook or script themselves, such as"
            " plugins=[my_rule], got the module '__main__'"
        )
    if "/" in name or name.endswith(".py"):
        raise PluginError(
            f"plug-in {name!r}: expected the name of a module, such as"
            f" {Path(name).stem!r}, in the working directory, or of an installed one"
        )
    try:
        import_module(name)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise PluginError(
            f"plug-in {name!r} cannot be imported here ({what}); expected a Python module in the"
            " working directory, or an installed one, on every machine of the run"
        ) from error
    allow(name)


def _method(thing: Any) -> Method[Any]:
    method = method_of(thing)
    if method is None:
        raise PluginError(
            "plugins: expected names of modules, modules, or functions and classes decorated by"
            f" rayfed_lora.plugins, got {thing!r}"
        )
    return method


def folder_of(name: str) -> str | None:
    """Return where a module that is not installed is found; None for an installed one."""
    spec = find_spec(name.partition(".")[0])
    if spec is None:
        return None
    # A package without __init__.py has no file of its own.
    package = next(iter(spec.submodule_search_locations or ()), None)
    place = package or spec.origin
    if place is None or "site-packages" in place:
        return None
    return str(Path(place).resolve().parent)


@dataclass(frozen=True)
class Origin:
    """Where a method comes from.

    Attributes:
        kind, name: of the method.
        module: that defines it.
        version: of the distribution, or of the module; None where neither has one.
        sha256: of the module's file; of a notebook's or script's method, of its own source.
    """

    kind: str
    name: str
    module: str
    version: str | None
    sha256: str


def origin(method: Method[Any]) -> Origin:
    """Return where a method comes from."""
    if method.by_value:
        content = method.source.encode()
    else:
        content = Path(str(sys.modules[method.module].__file__)).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Origin(method.kind, method.name, method.module, _version(method.module), digest)


def _version(module: str) -> str | None:
    top = module.partition(".")[0]
    names = metadata.packages_distributions().get(top)
    if names:
        return metadata.version(names[0])
    found = getattr(sys.modules.get(module), "__version__", None)
    return None if found is None else str(found)
