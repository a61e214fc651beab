"""Tables of methods by name: the built-in ones and those of plug-ins, made by the same decorators.

Reading a table imports the modules of its built-in methods; these import no torch. Plug-ins are
imported by `modules` only.

Source: this project.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial, update_wrapper
from importlib import import_module
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from rayfed_lora.errors import PluginError
from rayfed_lora.plugins.options import options_of
from rayfed_lora.plugins.sources import source_of

T = TypeVar("T")
Kind = Literal[
    "rule",
    "shape",
    "acceptance",
    "allocation",
    "sampler",
    "weight",
    "objective",
    "optimizer",
    "update",
    "partition",
    "data",
    "model",
    "metric",
]
# The key of a recipe that names a method; its options stand beside it.
KEYS: Mapping[Kind, str] = {
    "rule": "aggregation.rule",
    "shape": "annealing.cooling.shape",
    "acceptance": "annealing.acceptance.name",
    "allocation": "annealing.allocation.name",
    "sampler": "clients.sampler.name",
    "weight": "clients.weight.name",
    "objective": "clients.objective.name",
    "optimizer": "clients.optimizer.name",
    "partition": "data.partition.kind",
    "data": "data.source",
    "model": "model.source",
    # That of codecs; attacks: `clients.attack.name`.
    "update": "wire.up.name",
}
# Attribute of a decorated class or function that holds its `Method`.
_MARK = "__rayfed_lora_method__"
# Attribute of one that cannot be imported: its source, where it was first registered.
_SOURCE = "__rayfed_lora_source__"
_OWN = "rayfed_lora."
TABLES: dict[Kind, Table[Any]] = {}
# Modules of plug-ins that this process has imported because its caller allowed them.
_ALLOWED: set[str] = set()


@dataclass(frozen=True, eq=False)
class Method(Generic[T]):
    """A registered method.

    Attributes:
        kind: of method.
        name: its value in a recipe: `module:function` where a built-in method has its short name.
        short: as given to the decorator, or the function's with hyphens.
        value: what the rest of the package uses, e.g. an aggregation `Rule`, without options.
        target: the decorated function or class.
        options: the model of its options.
        bind: returns `value` with options applied.
        again: registers the target in another process.
    """

    kind: Kind
    name: str
    short: str
    value: T
    target: Any
    options: type[BaseModel]
    bind: Callable[[T, Mapping[str, Any]], T]
    again: Callable[[Any], Any]

    @property
    def module(self) -> str:
        """The module that defines it."""
        return str(self.target.__module__)

    @property
    def built_in(self) -> bool:
        """Whether it comes with the package."""
        return self.module.startswith(_OWN)

    @property
    def by_value(self) -> bool:
        """Whether no import finds it: it is of a notebook or script, or made inside a function."""
        return _by_value(self.target)

    @property
    def source(self) -> str:
        """The source of one that no import finds; its bytecode where there is none."""
        return str(getattr(self.target, _SOURCE))

    @property
    def summary(self) -> str:
        """The first line of its docstring; may be empty."""
        return (self.target.__doc__ or "").strip().partition("\n")[0]

    def with_options(self, options: Mapping[str, Any]) -> T:
        """Return the value with those of some values that are its options, as validated."""
        known = {key: options[key] for key in self.options.model_fields if key in options}
        return self.bind(self.value, known) if known else self.value


@dataclass(frozen=True)
class Choice:
    """A method and its options, as `trimmed_mean(share=0.2)` returns it."""

    method: Method[Any]
    options: Mapping[str, Any]


class Decorated:
    """A decorated function: with data it computes, with options alone it returns a `Choice`."""

    def __init__(self, function: Callable[..., Any], method: Method[Any]) -> None:
        """Keep the function; its name, docstring and module are this object's too."""
        self._function = function
        setattr(self, _MARK, method)
        update_wrapper(self, function)

    def __call__(self, *data: Any, **options: Any) -> Any:
        """Compute, or choose: see the class."""
        if data:
            return self._function(*data, **options)
        return choice_of(self, options)

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle by name, as a function is; one that no import finds with its code.

        The latter needs cloudpickle.
        """
        if _by_value(self._function):
            return method_of(self).again, (self._function,)  # type: ignore[union-attr]
        return str(vars(self)["__qualname__"])


class Table(Mapping[str, T]):
    """The methods of a kind by name; a name may be `module:attribute` of an allowed plug-in."""

    def __init__(self, kind: Kind, *homes: str) -> None:
        """Make the table of a kind.

        Args:
            kind: of its methods.
            homes: modules whose import registers the built-in methods.
        """
        self.kind = kind
        self._homes = homes
        self._methods: dict[str, Method[T]] = {}
        TABLES[kind] = self

    def add(
        self,
        target: Any,
        name: str | None = None,
        *,
        value: Callable[[str], T] | None = None,
        bind: Callable[[T, Mapping[str, Any]], T] | None = None,
    ) -> Any:
        """Register a function or class; return what stands for it from then on.

        Args:
            target: the function or class.
            name: default: its own with hyphens.
            value: computes the table's value from the name; default: the target.
            bind: returns a value with options applied; default: `functools.partial`.

        Raises:
            PluginError: the name is another method's, or an option is not typed.
        """
        short = name or _hyphenated(target.__name__)
        full = self._free(short, target)
        if not target.__module__.startswith(_OWN):
            _keep_source(target)
        method = Method(
            kind=self.kind,
            name=full,
            short=short,
            value=target if value is None else value(full),
            target=target,
            options=options_of(target, full),
            bind=bind or _partial,
            again=partial(self.add, name=name, value=value, bind=bind),
        )
        self._methods[full] = method
        if isinstance(target, type):
            setattr(target, _MARK, method)
            return target
        return Decorated(target, method)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by kind: each process has its own table."""
        return _table, (self.kind,)

    def _free(self, name: str, target: Any) -> str:
        """Return a name that no other method has: the given one, or one with the module."""
        if not target.__module__.startswith(_OWN):
            self._load()
        held = self._methods.get(name)
        if held is not None and _path(held.target) != _path(target):
            if held.built_in:
                return _path(target)
            raise PluginError(
                f"{self.kind} {name!r} of {_path(target)}: expected a name of its own;"
                f" {name!r} is {_path(held.target)}"
            )
        if not name or ":" in name:
            raise PluginError(f"{self.kind} {name!r}: expected a name without a colon")
        return name

    def _load(self) -> None:
        for home in self._homes:
            import_module(home)

    def method(self, name: str) -> Method[T]:
        """Return the method of a name; raises KeyError where there is none."""
        self._load()
        if ":" in name and name not in self._methods:
            return self._referenced(name)
        return self._methods[name]

    def _referenced(self, name: str) -> Method[T]:
        """Return the method at `module:attribute`, decorated in that very module."""
        module, _, attribute = name.partition(":")
        if module not in _ALLOWED:
            raise KeyError(name)
        found = method_of(getattr(sys.modules[module], attribute, None))
        if found is None or found.kind != self.kind or found.module != module:
            raise KeyError(name)
        return found

    def with_options(self, name: str, options: Mapping[str, Any]) -> T:
        """Return the value of a name with those of some values that are its options."""
        return self.method(name).with_options(options)

    def __getitem__(self, name: str) -> T:
        return self.method(name).value

    def __iter__(self) -> Iterator[str]:
        return (method.name for method in self.methods())

    def __len__(self) -> int:
        self._load()
        return len(self._methods)

    def methods(self) -> tuple[Method[T], ...]:
        """Return all methods: the built-in ones by module, however imported, then others."""
        self._load()
        found = self._methods.values()
        return tuple(sorted(found, key=lambda m: (not m.built_in, m.module if m.built_in else "")))

    def restore(self, method: Method[T]) -> None:
        """Let the name of a method that no import finds stand for it again."""
        if method.by_value:
            self._methods[method.name] = method

    def remove(self, name: str) -> None:
        """Forget a method, e.g. one of a test."""
        del self._methods[name]


def _table(kind: Kind) -> Table[Any]:
    return TABLES[kind]


def method_of(thing: object) -> Method[Any] | None:
    """Return the method of a decorated function or class, or of an instance of the class."""
    found = getattr(thing, _MARK, None)
    return found if isinstance(found, Method) else None


def choice_of(thing: Any, options: Mapping[str, Any]) -> Choice:
    """Return a method with options, checked; raises PluginError."""
    method = method_of(thing)
    if method is None:
        raise PluginError(f"expected a decorated method, got {thing!r}")
    try:
        checked = method.options.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        known = ", ".join(method.options.model_fields) or "none"
        raise PluginError(
            f"{method.kind} {method.name!r}: option {'.'.join(map(str, first['loc']))}:"
            f" {first['msg']}, got {first['input']!r}; its options are {known}"
        ) from None
    return Choice(method, checked.model_dump(mode="json", exclude_unset=True))


def allowed() -> frozenset[str]:
    """Return the modules of plug-ins that this process has imported."""
    return frozenset(_ALLOWED)


def allow(module: str) -> None:
    """Let recipes name the methods of a module by `module:attribute`; it has been imported."""
    _ALLOWED.add(module)


def _partial(value: Any, options: Mapping[str, Any]) -> Any:
    return partial(value, **options)


def _by_value(target: Any) -> bool:
    return _SOURCE in vars(target)


def _keep_source(target: Any) -> None:
    """Note the source of what no import finds, once: in other processes there is none."""
    hidden = target.__module__ == "__main__" or "<locals>" in target.__qualname__
    if hidden and not _by_value(target):
        setattr(target, _SOURCE, source_of(target))


def _path(target: Any) -> str:
    return f"{target.__module__}:{target.__qualname__}"


def _hyphenated(name: str) -> str:
    """Return a function's or a class's name as recipes write it.

    >>> _hyphenated("trimmed_mean"), _hyphenated("ErrorFeedback")
    ('trimmed-mean', 'error-feedback')
    """
    words = "".join(f"-{c.lower()}" if c.isupper() else c for c in name)
    return words.strip("-").replace("_", "-")
