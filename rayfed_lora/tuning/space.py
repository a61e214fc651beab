"""Search spaces: recipe values, their distributions, and their files. Source: this project."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayfed_lora.errors import BadInputError, did_you_mean
from rayfed_lora.recipe.faults import closest
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.recipe.yaml_text import parse_yaml, read_text
from rayfed_lora.runs.summary import TESTED
from rayfed_lora.types import Stage

Mode = Literal["max", "min"]
# Metrics that are not measured by each task's tests.
_NOT_TESTED = {
    "causal-lm": {"eval_auc", "eval_macro_f1"},
    "image-classification": {"eval_perplexity"},
    "text-classification": {"eval_perplexity"},
}
METRICS = (*TESTED, "train_loss", "total_bytes", "bytes_up", "bytes_down", "bytes_base", "seconds")
ROUNDS = tuple(f"annealing.{stage}.rounds" for stage in get_args(Stage))
# Trials share actors and write to their own folders.
_NOT_SEARCHED = ("runtime", "storage", "tracking", "name")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Drawn(_Strict):
    """The distribution of one value, of exactly one kind.

    Attributes:
        choice: values of equal probability.
        uniform, loguniform: [low, high] of a number.
        randint: [low, high] of a whole number, both included.
        of: key whose value is multiplied by the drawn number; the product is rounded to a whole
            number, at least 1.
        when: values that other keys must have; otherwise the recipe's own value is used.
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
        """Whether only numbers of 0 or more are drawn, without `of` and `when`."""
        lowest = [self.limits[0]] if self.limits is not None else self.choice or []
        numbers = all(is_number(value) and value >= 0 for value in lowest)
        return numbers and self.of is None and not self.when

    @property
    def limits(self) -> tuple[float, float] | None:
        """Smallest and largest number, None for a choice."""
        return self.uniform or self.loguniform or self.randint


class Space(_Strict):
    """A search space.

    Attributes:
        parameters: distributions by recipe key; keys that `of` or `when` name come first.
        rounds: distributions of stages' rounds by recipe key, as shares of the total that these
            stages have in the recipe.
        objectives: metric -> max or min; schedulers use the first one.
        samples: number of trials; a grid has one for each combination.
        scheduler: ends trials early.
        search: draws the values.
    """

    parameters: dict[str, Drawn] = Field(default_factory=dict)
    rounds: dict[str, Drawn] = Field(default_factory=dict)
    objectives: dict[str, Mode] = Field(default={"eval_accuracy": "max"}, min_length=1)
    samples: int = Field(16, gt=0)
    scheduler: Literal["asha", "pbt", "median", "none"] = "asha"
    search: Literal["random", "optuna", "grid"] = "random"

    @model_validator(mode="after")
    def _fits_together(self) -> Space:
        if not self.drawn:
            raise ValueError("expected something to draw under parameters or rounds")
        known: set[str] = set()
        for key, how in self.parameters.items():
            later = ({how.of, *how.when} - {None} - known) & set(self.drawn)
            if later:
                raise ValueError(f"{key}: expected {later.pop()} before it, among the parameters")
            if key.split(".")[0] in _NOT_SEARCHED:
                raise ValueError(f"{key}: expected a key that may differ between trials")
            known.add(key)
        wrong = set(self.rounds) - set(ROUNDS) | set(self.rounds) & set(self.parameters)
        if wrong:
            raise ValueError(f"rounds: expected keys of {', '.join(ROUNDS)}, once; got {wrong}")
        if not all(how.is_share for how in self.rounds.values()):
            raise ValueError("rounds: expected shares of 0 or more, without `of` and `when`")
        unknown = set(self.objectives) - set(METRICS)
        if unknown:
            raise ValueError(f"objectives: expected metrics of {', '.join(METRICS)}; got {unknown}")
        return self

    @model_validator(mode="after")
    def _can_search(self) -> Space:
        numbers = [key for key, how in self.drawn.items() if how.uniform or how.loguniform]
        if self.search == "grid" and numbers:
            raise ValueError(f"search grid: expected choice or randint for {numbers[0]}")
        if self.search != "random" and self.scheduler == "pbt":
            raise ValueError(f"scheduler pbt: expected search random, got {self.search}")
        several = len(self.objectives) > 1
        if self.search == "optuna" and several and self.scheduler != "none":
            raise ValueError(
                "search optuna with several objectives: expected scheduler none, since metrics of"
                f" trials that ended early are not comparable; got {self.scheduler}"
            )
        return self

    @property
    def drawn(self) -> dict[str, Drawn]:
        """All distributions, by key."""
        return {**self.parameters, **self.rounds}


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_objectives(space: Space, recipe: Recipe) -> None:
    """Raise BadInputError if an objective is not measured by tests of the recipe's task."""
    task = recipe.model.task
    wrong = sorted(_NOT_TESTED[task] & set(space.objectives))
    if wrong:
        raise BadInputError(f"objectives: {wrong[0]} is not measured with model.task {task!r}")


def load_space(source: str | Path | Mapping[str, Any], **overrides: Any) -> Space:
    """Return the space of a shipped name, a YAML file or a mapping.

    `overrides` are values of fields of `Space`; None keeps the space's own value.

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
        raise BadInputError(
            f"{name}: faults in the search space; nothing was started{faults}"
        ) from None


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
            f" ({error}){did_you_mean(closest(str(source), list(shipped)))}"
        ) from None
    if not isinstance(raw, Mapping):
        raise BadInputError(f"{source}: expected a mapping, got {type(raw).__name__}")
    return str(source), raw
