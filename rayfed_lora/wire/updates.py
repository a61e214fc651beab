"""The one table of codecs and attacks; each built-in one's own file names its paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules

from rayfed_lora.plugins import tables
from rayfed_lora.plugins.registry import Table
from rayfed_lora.wire import built_in
from rayfed_lora.wire.update import UpdateMethod

for _module in iter_modules(built_in.__path__):
    import_module(f"{built_in.__name__}.{_module.name}")

UPDATES: Table[UpdateMethod] = tables.UPDATES


class _Part(Mapping[str, UpdateMethod]):
    """The codecs, or the attacks, of the table."""

    def __init__(self, *, codecs: bool) -> None:
        self._codecs = codecs

    def __getitem__(self, name: str) -> UpdateMethod:
        found = UPDATES[name]
        if found.is_codec != self._codecs:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name, each in UPDATES.items() if each.is_codec == self._codecs)

    def __len__(self) -> int:
        return sum(1 for _ in self)


CODECS: Mapping[str, UpdateMethod] = _Part(codecs=True)
ATTACKS: Mapping[str, UpdateMethod] = _Part(codecs=False)
