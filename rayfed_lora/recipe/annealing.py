"""The schedule of the parameter budget: sections of the recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rayfed_lora.plugins.tables import ACCEPTANCES, ALLOCATIONS, SHAPES
from rayfed_lora.recipe.fields import (
    Choosing,
    Count,
    Finite,
    NameIn,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    TextOr,
    also_plain,
    option,
    section,
)

Needs = Literal["nothing", "energies", "metric"]


class Initiating(Section):
    """The first stage: training with a proximal term against client drift."""

    rounds: Count = option(2, "length of the stage", "rounds")
    trainable: Literal["full", "adapter", "none"] = option(
        "full", "full: every weight | adapter: factors and head | none: skip the stage"
    )
    proximal_weight: NonNegative = option(
        0.01, "mu of the proximal term (mu / 2) * ||theta - theta_received||^2"
    )
    lr: PositiveFloat | None = option(
        None, "local learning rate of this stage; null: `clients.optimizer.lr`"
    )


class Heating(Section):
    """The stage at the high parameter budget."""

    rounds: Count = option(4, "length of the stage", "rounds")
    rank: Count = option(16, "LoRA rank R0", "rank")
    shape: Literal["hold", "ramp"] = option(
        "hold", "hold: R0 throughout | ramp: linearly from cooling.rank up to R0"
    )

    @property
    def ramps(self) -> bool:
        """Whether the rank rises from cooling.rank in this stage."""
        return self.shape == "ramp" and self.rounds > 0


class Cooling(Choosing):
    """The stage of the shrinking parameter budget."""

    choice = ("shape", SHAPES)

    rounds: Count = option(10, "length of the stage", "rounds")
    rank: Count = option(2, "LoRA rank R1 at its end", "rank")
    shape: Annotated[str, NameIn(SHAPES)] = option(
        "cosine", "curve from heating.rank to cooling.rank"
    )
    steps: Positive = option(4, "number of plateaus (shape step)", "steps")
    residual: Literal["drop", "fold"] = option(
        "drop", "the part of the update that a cut removes: dropped, or folded into the frozen base"
    )


class Holding(Section):
    """The last stage, at the low budget."""

    rounds: Count = option(4, "length of the stage", "rounds")


class Target(Section):
    """The metric that a lower rank must hold (acceptance target)."""

    metric: Literal["accuracy", "loss"] = option("accuracy", "validation metric to watch")
    value: Finite | None = option(None, "value to hold; null: the best one at the heating rank")
    tolerance: NonNegative = option(
        0.01, "how far below (loss: above) the value still counts as held"
    )


class AcceptanceRule(Choosing):
    """When a lower rank is accepted; options of the method stand beside `name`."""

    choice = ("name", ACCEPTANCES)

    name: Annotated[str, NameIn(ACCEPTANCES)] = option(
        "always", "always | metropolis: by Metropolis' rule | target: while a target holds"
    )


class AllocationRule(Choosing):
    """How modules share the budget; options of the method stand beside `name`."""

    choice = ("name", ALLOCATIONS)

    name: Annotated[str, NameIn(ALLOCATIONS)] = option(
        "uniform", "uniform: one rank for all modules | spectral: by singular energy a parameter"
    )


_ACCEPTANCE, _ALLOCATION = TextOr(AcceptanceRule), TextOr(AllocationRule)


class Annealing(Section):
    """The schedule of the parameter budget, the core of SA-FedLoRA."""

    mode: Literal["staged", "full", "fixed"] = option(
        "staged",
        "staged: the four stages | full: the full model in all rounds (FedAvg) | fixed: the adapter"
        " at heating.rank in all rounds; the number of rounds is the sum over the stages in each",
    )
    initiating: Initiating = section(Initiating, "regularised first rounds")
    heating: Heating = section(Heating, "rounds at the high rank")
    cooling: Cooling = section(Cooling, "rounds in which the rank falls")
    holding: Holding = section(Holding, "rounds at the low rank")
    allocation: Annotated[str | AllocationRule, _ALLOCATION] = Field(
        "uniform",
        description="how modules share the budget of a round; a text: the method's name",
        json_schema_extra=lambda schema: also_plain(schema, "string"),
    )
    acceptance: Annotated[str | AcceptanceRule, _ACCEPTANCE] = Field(
        "always",
        description="when a lower rank is accepted; a text: the method's name",
        json_schema_extra=lambda schema: also_plain(schema, "string"),
    )
    temperature: PositiveFloat = option(0.05, "first temperature (metropolis)", "nats of loss")
    temperature_decay: Annotated[float, Field(gt=0.0, le=1.0)] = option(
        0.8, "factor on the temperature for each cooling round (metropolis)"
    )
    target: Target = section(Target, "the metric that acceptance target holds")

    @property
    def feedback(self) -> Needs:
        """What the acceptance rule needs to know; nothing where ranks never fall."""
        if self.mode != "staged":
            return "nothing"
        needs: Needs = ACCEPTANCES[self.accepts.name].needs
        return needs

    @property
    def accepts(self) -> AcceptanceRule:
        """`acceptance` with the options of its method."""
        found: AcceptanceRule = _ACCEPTANCE.of(self.acceptance)
        return found

    @property
    def allocates(self) -> AllocationRule:
        """`allocation` with the options of its method."""
        found: AllocationRule = _ALLOCATION.of(self.allocation)
        return found

    @property
    def cools(self) -> bool:
        """Whether the cooling curve sets the rank of a round; holding keeps its last value."""
        return self.cooling.shape != "constant" and self.cooling.rounds + self.holding.rounds > 0

    @property
    def initiating_rounds(self) -> int:
        """Rounds of the initiating stage, 0 where it is skipped."""
        return 0 if self.initiating.trainable == "none" else self.initiating.rounds

    @property
    def total_rounds(self) -> int:
        """T, the number of communication rounds."""
        rest = self.heating.rounds + self.cooling.rounds + self.holding.rounds
        return self.initiating_rounds + rest
