"""Search spaces from YAML: the shipped ones and the user's own. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.yaml_text import parse_yaml, read_text
from rayfed_lora.tuning.space import Space


def load_space(source: str | Path | Mapping[str, Any], **overrides: Any) -> Space:
    """Return the space of a shipped name, a YAML file or a mapping.

    Args:
        source: the name, the path or the mapping.
        overrides: values of fields of `Space`; None keeps the space's own value.

    Raises:
        BadInputError: the space cannot be read, or has faults; the message lists all of them.
    """
    name, raw = _read(source)
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("search", raw.get("search")) == "grid" and "samples" in given:
        raise BadInputError("--samples: a grid runs each of its combinations once; omit the option")
    try:
        return Space.model_validate({**raw, **given})
    except ValidationError as error:
        faults = "".join(
            f"\n  {'.'.join(map(str, fault['loc'])) or 'space'}: {fault['msg']}"
            for fault in error.errors()
        )
        message = f"{name}: faults in the search space; nothing was started{faults}"
        raise BadInputError(message) from None


def shipped_spaces() -> dict[str, Path]:
    """Return the files of the shipped spaces, by name."""
    # A checkout has them beside the package, a wheel among its data files.
    beside = Path(__file__).parents[2] / "tune_spaces"
    if beside.is_dir():
        files = list(beside.glob("*.yaml"))
    else:
        installed = metadata.files("rayfed-lora") or []
        files = [Path(str(f.locate())) for f in installed if f.parent.name == "tune_spaces"]
    return {file.stem: file for file in sorted(files)}


def _read(source: str | Path | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(source, Mapping):
        return "search space", source
    shipped = shipped_spaces()
    path = shipped.get(str(source), Path(source))
    try:
        raw = parse_yaml(str(source), read_text(path))
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"SPACE: expected one of {', '.join(shipped)}, or a readable YAML file; got {source!r}"
            f" ({error})"
        ) from None
    if not isinstance(raw, Mapping):
        raise BadInputError(f"{source}: expected a mapping, got {type(raw).__name__}")
    return str(source), raw
