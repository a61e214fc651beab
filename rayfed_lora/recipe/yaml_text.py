"""YAML 1.2 text of recipes and other documents, with limits on its size and depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from rayfed_lora.errors import Fault, RecipeError
from rayfed_lora.recipe.plain_values import excess

# Enough for a long list of ranks; a longer text is hostile.
_MOST_CHARACTERS = 1 << 20
# Longest part of a user's text that an error repeats, characters.
MOST_SHOWN = 400
_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")


def parse_yaml(name: str, text: str, where: str = "(file)") -> Any:
    """Return a YAML 1.2 document (`1e-3` is a number, `no` is a text).

    Raises:
        RecipeError: `text` is not YAML, or exceeds a limit; names the recipe and the place.
    """
    if len(text) > _MOST_CHARACTERS:
        expected = f"expected at most {_MOST_CHARACTERS:,} characters of YAML"
        raise RecipeError(name, [Fault(where, expected, f"{len(text):,}")])
    try:
        found = _yaml().load(text)
    except Exception as error:  # the reader's constructors raise errors of many kinds
        problem = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise RecipeError(name, [Fault(where, "expected YAML", problem)]) from None
    check_size(name, found, where)
    return found


def read_text(path: Path) -> str:
    """Return the text of a YAML file, cut well above the longest that `parse_yaml` accepts.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not UTF-8.
    """
    with path.open(encoding="utf-8", newline="") as file:
        return file.read(4 * _MOST_CHARACTERS)


def yaml_text(content: Mapping[str, Any]) -> str:
    """Return plain values as YAML."""
    out = StringIO()
    _yaml().dump(content, out)
    return out.getvalue()


def check_size(name: str, value: Any, where: str = "(file)") -> None:
    """Raise a `RecipeError` where a document exceeds a limit of `plain_values`."""
    found = excess(value)
    if found is not None:
        raise RecipeError(name, [Fault(where, found)])


def shortened(text: str) -> str:
    """Return at most `MOST_SHOWN` characters of a text."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class _Representer(SafeRepresenter):
    """Quotes texts with Unicode's own line breaks: plain scalars would lose these."""

    def represent_str(self, data: str) -> Any:
        style = '"' if _BREAKS.search(data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Representer.add_representer(str, _Representer.represent_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    # A key that is folded over two lines cannot be read again.
    yaml.width = 4 * _MOST_CHARACTERS
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml
