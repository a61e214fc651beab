"""What instruction and chat data, and packed texts, go with."""

from __future__ import annotations

from collections.abc import Iterator

from rayfed_lora.recipe.settings import Settings


def text_conflicts(recipe: Settings) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield keys and message of each conflict of the format of texts."""
    model = recipe.model
    if model.task != "causal-lm":
        kind = recipe.data.format.kind
        if kind in ("instruction", "chat"):
            yield (
                ("data.format.kind", "model.task"),
                f"expected auto or text with model.task {model.task!r}, got {kind!r}: only a"
                " causal-lm learns responses",
            )
        if recipe.data.packing:
            yield (
                ("data.packing", "model.task"),
                f"expected false with model.task {model.task!r}, got true: only texts of a"
                " causal-lm are packed",
            )
    if recipe.data.format.kind in ("instruction", "chat") and recipe.data.text_column != "auto":
        yield (
            ("data.text_column", "data.format.kind"),
            f"expected auto with data.format {recipe.data.format.kind!r}, whose columns are known"
            f" by their names, got {recipe.data.text_column!r}",
        )
