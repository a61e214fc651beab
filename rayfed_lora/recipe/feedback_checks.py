"""What annealing feedback, early stopping and the choice of the best model go with."""

from __future__ import annotations

from collections.abc import Iterator

from rayfed_lora.plugins.tables import METRICS
from rayfed_lora.recipe.settings import Settings

_Found = tuple[tuple[str, ...], str]


def feedback_conflicts(recipe: Settings) -> Iterator[_Found]:
    """Yield keys and message of each conflict of what looks at the validation split."""
    yield from _acceptance_conflicts(recipe)
    yield from _selection_conflicts(recipe)


def _selection_conflicts(recipe: Settings) -> Iterator[_Found]:
    settings = recipe.evaluation
    keys = {"early_stopping": settings.early_stopping, "keep_best": settings.keep_best}
    used = [f"evaluation.{key}" for key, value in keys.items() if value is not None]
    if used and recipe.data.validation_fraction == 0:
        yield (
            ("data.validation_fraction", *used),
            f"{' and '.join(used)} look at the validation split: expected a value above 0 (or"
            " auto), got 0",
        )
    built_in = [method.name for method in METRICS.methods() if method.built_in]
    for metric in dict.fromkeys(settings.watched):
        if metric not in (*built_in, *settings.metrics):
            yield (
                ("evaluation.metrics", *used),
                f"expected {metric!r} among them: it is watched, and has to be computed",
            )
    texts = recipe.model.task == "causal-lm"
    unknown = ("macro_f1", "auc") if texts else ("perplexity",)
    for metric in dict.fromkeys(settings.watched):
        if metric in unknown:
            yield (
                ("model.task", *used),
                f"a {recipe.model.task} model has no {metric}: expected another metric, such as"
                " loss",
            )


def _acceptance_conflicts(recipe: Settings) -> Iterator[_Found]:
    annealing, name = recipe.annealing, recipe.annealing.accepts.name
    if annealing.feedback == "nothing":
        return
    if recipe.data.validation_fraction == 0:
        yield (
            ("data.validation_fraction", "annealing.acceptance"),
            f"annealing.acceptance '{name}' needs a value above 0 (or auto), got 0",
        )
    if annealing.feedback == "energies" and annealing.cooling.residual == "fold":
        yield (
            ("annealing.acceptance", "annealing.cooling.residual"),
            f"'{name}' does not go with residual 'fold': a folded cut does not change the model,"
            " so every proposal would be accepted; use 'always', or residual 'drop'",
        )
    adapter_initiating = annealing.initiating.trainable == "adapter" and annealing.initiating_rounds
    at_heating_rank = annealing.heating.rounds > 0 or adapter_initiating
    value_is_sought = name == "target" and annealing.target.value is None
    if value_is_sought and not at_heating_rank:
        yield (
            ("annealing.target.value", "annealing.heating.rounds"),
            "acceptance 'target' expects a number here, or heating.rounds above 0 to find it in",
        )
