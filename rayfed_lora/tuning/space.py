"""Search spaces: what is drawn, and the recipe that a draw stands for.

A draw is mapped to a recipe that can run: ranks are drawn as shares of other ranks, rounds as
shares of a total that stays, and what only matters beside another choice is left out elsewhere.

Source: this project.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayfed_lora.annealing.stages import stage_lengths
from rayfed_lora.endpoints import named_in
from rayfed_lora.errors import BadInputError
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.presets import usual_scaling, usual_server_rate
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml, read_text
from rayfed_lora.runs.summary import TESTED
from rayfed_lora.types import Stage

Mode = Literal["max", "min"]
Scheduler = Literal["asha", "pbt", "median", "none"]
Search = Literal["random", "optuna", "grid"]
# What is tested on each kind of model beside accuracy and loss.
_TESTED_ON: Mapping[str, frozenset[str]] = {
    "causal-lm": frozenset({"eval_perplexity"}),
    "image-classification": frozenset({"eval_macro_f1", "eval_auc"}),
    "text-classification": frozenset({"eval_macro_f1", "eval_auc"}),
}
METRICS = (
    *TESTED,
    "train_loss",
    "total_bytes",
    "bytes_up",
    "bytes_down",
    "bytes_base",
    "seconds",
)
_STAGES: tuple[Stage, ...] = ("initiating", "heating", "cooling", "holding")
_ROUNDS = tuple(f"annealing.{stage}.rounds" for stage in _STAGES)
# Trials share actors and have folders of their own.
_NOT_SEARCHED = ("runtime", "storage", "tracking", "name")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Drawn(_Strict):
    """The distribution of one value; exactly one kind is given.

    Attributes:
        choice: one of these, each as likely.
        uniform, loguniform: a number from the first to the second.
        randint: a whole number from the first to the second, both included.
        of: key whose value is multiplied by what is drawn; the product is rounded to a whole
            number, at least 1.
        when: keys and the values they must have; else the recipe's own value stays.
    """

    choice: list[Any] | None = Field(None, min_length=1)
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None
    of: str | None = None
    when: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_kind(self) -> Drawn:
        kinds = ("choice", "uniform", "loguniform", "randint")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of {', '.join(kinds)}, got {given or 'none'}")
        limits = self.limits
        if limits is not None and not limits[0] < limits[1]:
            raise ValueError(f"expected {given[0]}: [low, high], got {list(limits)}")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform: expected a low end above 0, got {self.loguniform[0]}")
        return self

    @property
    def is_share(self) -> bool:
        """Whether only numbers of 0 or more are drawn, whatever else there is."""
        lowest = [self.limits[0]] if self.limits is not None else self.choice or []
        numbers = all(_is_number(value) and value >= 0 for value in lowest)
        return numbers and self.of is None and not self.when

    @property
    def limits(self) -> tuple[float, float] | None:
        """Smallest and largest number, None for a choice."""
        return self.uniform or self.loguniform or self.randint


class Space(_Strict):
    """A search space.

    Attributes:
        parameters: what is drawn, by recipe key; a key that `of` or `when` names stands before.
        rounds: stages' rounds, by recipe key, as shares of the rounds that these stages have in
            the recipe.
        objectives: metric -> max or min; schedulers look at the first one.
        samples: number of trials; a grid has as many as combinations.
        scheduler: which trials end early: asha | pbt | median | none.
        search: how values are drawn: random | optuna | grid.
    """

    parameters: dict[str, Drawn] = Field(default_factory=dict)
    rounds: dict[str, Drawn] = Field(default_factory=dict)
    objectives: dict[str, Mode] = Field(default={"eval_accuracy": "max"}, min_length=1)
    samples: int = Field(16, gt=0)
    scheduler: Scheduler = "asha"
    search: Search = "random"

    @model_validator(mode="after")
    def _fits_together(self) -> Space:
        if not self.drawn:
            raise ValueError("expected something to draw under parameters or rounds")
        known: set[str] = set()
        for key, how in self.parameters.items():
            later = ({how.of, *how.when} - {None} - known) & set(self.drawn)
            if later:
                raise ValueError(
                    f"{key}: expected {later.pop()} to stand before it, among the parameters"
                )
            if key.split(".")[0] in _NOT_SEARCHED:
                raise ValueError(f"{key}: expected a key that all trials need not share")
            known.add(key)
        wrong = set(self.rounds) - set(_ROUNDS) | set(self.rounds) & set(self.parameters)
        if wrong:
            raise ValueError(f"rounds: expected keys of {', '.join(_ROUNDS)}, once; got {wrong}")
        if not all(how.is_share for how in self.rounds.values()):
            raise ValueError("rounds: expected shares of 0 or more, without `of` and `when`")
        unknown = set(self.objectives) - set(METRICS)
        if unknown:
            raise ValueError(f"objectives: expected metrics of {', '.join(METRICS)}; got {unknown}")
        self._check_search()
        return self

    def _check_search(self) -> None:
        numbers = [key for key, how in self.drawn.items() if how.uniform or how.loguniform]
        if self.search == "grid" and numbers:
            raise ValueError(f"search grid: expected choice or randint, not so {numbers[0]}")
        if self.search != "random" and self.scheduler == "pbt":
            raise ValueError(f"scheduler pbt: expected search random, got {self.search}")
        several = len(self.objectives) > 1
        if self.search == "optuna" and several and self.scheduler != "none":
            raise ValueError(
                "search optuna with several objectives: expected scheduler none, since what a trial"
                f" has sent says nothing where it ended early; got {self.scheduler}"
            )

    @property
    def drawn(self) -> dict[str, Drawn]:
        """All that is drawn, by key."""
        return {**self.parameters, **self.rounds}

    def settings(self, draw: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
        """Return the recipe values that a draw stands for.

        Args:
            draw: a value by key of `drawn`.
            recipe: what is not drawn.
        """
        found: dict[str, Any] = {}

        def value(key: str) -> Any:
            return found[key] if key in found else value_of(recipe, key)

        for key, how in self.parameters.items():
            if any(value(other) != wanted for other, wanted in how.when.items()):
                continue
            found[key] = draw[key] if how.of is None else _share(key, draw[key], value(how.of))
        skipped = value("annealing.initiating.trainable") == "none"
        shared = [key for key in self.rounds if not (skipped and key == _ROUNDS[0])]
        if shared:
            total = sum(value_of(recipe, key) for key in shared)
            found |= apportioned({key: draw[key] for key in shared}, total)
        return {**_followers(recipe, found), **found}


def _followers(recipe: Recipe, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that are an optimiser's usual ones in the recipe, for the drawn optimiser.

    A recipe that is resolved does not know any more which values nobody has written.
    """
    found: dict[str, Any] = {}
    clients, server = recipe.clients.optimizer, recipe.aggregation.server_optimizer
    name = drawn.get("clients.optimizer.name", clients.name)
    scaling = usual_scaling(recipe.method, name)
    if recipe.adapter.scaling == usual_scaling(recipe.method, clients.name) != scaling:
        found["adapter.scaling"] = scaling
    lr = usual_server_rate(drawn.get("aggregation.server_optimizer.name", server.name))
    if server.lr == usual_server_rate(server.name) != lr:
        found["aggregation.server_optimizer.lr"] = lr
    # A method that is drawn brings its own.
    return {} if "method" in drawn else found


def _share(key: str, share: Any, whole: Any) -> int:
    if not (_is_number(share) and _is_number(whole)):
        raise BadInputError(
            f"search space: {key}: expected a number and a number to multiply it by, got {share!r}"
            f" and {whole!r}"
        )
    return max(1, math.floor(float(share * whole) + 0.5))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_objectives(space: Space, recipe: Recipe) -> None:
    """Check that the recipe's model is tested for the objectives.

    Raises:
        BadInputError: it is not.
    """
    task = recipe.model.task
    elsewhere = frozenset[str]().union(*_TESTED_ON.values()) - _TESTED_ON[task]
    wrong = sorted(elsewhere & set(space.objectives))
    if wrong:
        raise BadInputError(f"objectives: {wrong[0]} is not measured with model.task {task!r}")


def value_of(recipe: Recipe, key: str) -> Any:
    """Return the value of a recipe's key such as `annealing.heating.rank`.

    Raises:
        BadInputError: there is no such key.
    """
    found: Any = recipe
    for part in key.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, BaseModel) and part in type(found).model_fields:
            found = getattr(found, part)
        else:
            raise BadInputError(f"search space: {key}: expected a key of the recipe")
    return found


def apportioned(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Return whole numbers in proportion to the shares that sum to the total.

    The largest remainders are rounded up (Hamilton's method); the first of equal ones. Shares that
    are all 0 are equal ones.

    >>> apportioned({"a": 1.0, "b": 1.0, "c": 0.5}, 9)
    {'a': 4, 'b': 3, 'c': 2}
    """
    whole = math.fsum(shares.values())
    exact = {
        key: (share / whole if whole > 0 else 1 / len(shares)) * total
        for key, share in shares.items()
    }
    found = {key: math.floor(value) for key, value in exact.items()}
    left = total - sum(found.values())
    # Sorting is stable: of equal remainders the first comes first.
    for key in sorted(exact, key=lambda key: found[key] - exact[key])[:left]:
        found[key] += 1
    return found


def continued(before: Recipe, after: Recipe, rounds_done: int) -> dict[str, int]:
    """Return stage lengths that keep a run's past and total, and else are those of `after`.

    A stage that is over keeps its length, the running one is not cut below what it has run, and
    holding takes up the difference. Without stages, in the modes `full` and `fixed`, nothing.

    Args:
        before: of the rounds done.
        after: of the rest.
        rounds_done: > 0.
    """
    if before.annealing.mode != "staged":
        return {}
    old, new = stage_lengths(before.annealing), stage_lengths(after.annealing)
    total = sum(old.values())
    found: dict[Stage, int] = {}
    for stage in _STAGES:
        start = sum(found.values())
        over = start + old[stage] <= rounds_done
        length = old[stage] if over else max(new[stage], rounds_done - start)
        found[stage] = min(length, total - start)
    found["holding"] += total - sum(found.values())
    if before.annealing.initiating.trainable == "none":
        del found["initiating"]
    return {f"annealing.{stage}.rounds": length for stage, length in found.items()}


def load_space(source: str | Path | Mapping[str, Any], **overrides: Any) -> Space:
    """Return the space of a shipped name, a YAML file or a mapping.

    Args:
        source: where it is.
        overrides: values of the fields of `Space`; None leaves what the space says.

    Raises:
        BadInputError: it cannot be read, or has faults; all are listed.
    """
    name, raw = _read(source)
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.get("search", raw.get("search")) == "grid" and "samples" in given:
        raise BadInputError("--samples: a grid runs each of its combinations once; leave it out")
    try:
        return Space.model_validate({**raw, **given})
    except ValidationError as error:
        faults = "".join(
            f"\n  {'.'.join(map(str, fault['loc'])) or 'space'}: {fault['msg']}"
            for fault in error.errors()
        )
        raise BadInputError(
            f"{name}: faults in the search space; nothing was started{faults}"
        ) from (None)


def shipped_spaces() -> dict[str, Path]:
    """Return the files of the shipped spaces, by name."""
    # A checkout has them beside the package; a wheel puts them where its data files go.
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


def trial_recipe(space: Space, recipe: Recipe, draw: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a draw stands for.

    Raises:
        RecipeError: the values do not go together.
    """
    # A space from a stranger names no endpoint as the user's own.
    named = named_in(recipe.model_dump())
    return load_recipe(recipe, space.settings(draw, recipe), endpoints=named)
