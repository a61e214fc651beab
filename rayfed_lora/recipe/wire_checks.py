"""Which codecs, attacks and privacy go with which other settings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rayfed_lora.aggregation.messages import AdapterRound
from rayfed_lora.aggregation.rule import Rule
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.objectives.objectives import OBJECTIVES
from rayfed_lora.recipe.settings import Settings
from rayfed_lora.types import Frozen, ModuleShape
from rayfed_lora.wire.updates import UPDATES

_Found = tuple[tuple[str, ...], str]


def wire_conflicts(recipe: Settings) -> Iterator[_Found]:
    """Yield keys and message of each conflict of codecs, attack and privacy."""
    yield from _codec_conflicts(recipe)
    attack = recipe.clients.attack
    labels = attack is not None and UPDATES[attack.name].acts_on == "labels"
    if labels and recipe.model.task == "causal-lm":
        yield (
            ("clients.attack.name", "model.task"),
            "expected an attack on updates with model.task 'causal-lm', whose examples have no"
            " labels",
        )
    if recipe.privacy is not None:
        yield from _privacy_conflicts(recipe)


def _codec_conflicts(recipe: Settings) -> Iterator[_Found]:
    up, down, name = recipe.wire.up.name, recipe.wire.down.name, recipe.aggregation.rule
    adapters = recipe.annealing.mode != "full"
    if recipe.wire.down.error_feedback:
        yield (
            ("wire.down.error_feedback",),
            "expected false: the memory is a client's, of its uploads; set wire.up.error_feedback",
        )
    if recipe.wire.up.error_feedback and (UPDATES[up].lossless or recipe.privacy is not None):
        why = f"'{up}' loses nothing" if UPDATES[up].lossless else "privacy bounds one update alone"
        keys = ("wire.up.name",) if UPDATES[up].lossless else ("privacy",)
        yield (("wire.up.error_feedback", *keys), f"expected false: {why}")
    lossy_up, lossy_down = not UPDATES[up].lossless, not UPDATES[down].lossless
    if not (lossy_up or lossy_down):
        return
    objective = OBJECTIVES[recipe.clients.objective.name]
    if objective.sends:
        yield (
            ("wire.up" if lossy_up else "wire.down", "clients.objective.name"),
            f"objective {objective.name!r} sends tensors beside the update, which no codec encodes;"
            " expected float32, or another objective",
        )
    sent_up, sent_down = _sends_tensors(RULES[name])
    if lossy_up and adapters and not sent_up:
        yield (
            ("wire.up", "aggregation.rule"),
            f"rule '{name}' declares other uploads than the trained tensors, which '{up}' encodes;"
            " expected float32, or another rule",
        )
    if not lossy_down:
        return
    if not UPDATES[down].down:
        fitting = ", ".join(n for n, c in UPDATES.items() if c.is_codec and c.down)
        yield (
            ("wire.down",),
            f"'{down}' encodes a change, the download is the state; expected one of {fitting}",
        )
    if adapters and not sent_down:
        yield (
            ("wire.down", "aggregation.rule"),
            f"rule '{name}' sends the result of a round, to be used or merged into the base"
            f" exactly; expected float32 in place of '{down}', or another rule",
        )
    if adapters and recipe.annealing.cooling.residual == "fold":
        yield (
            ("wire.down", "annealing.cooling.residual"),
            "with 'fold' clients fold a part of what they receive into their base, which must be"
            f" exact; expected float32 in place of '{down}', or residual drop",
        )


def _sends_tensors(rule: Rule) -> tuple[bool, bool]:
    """Return whether a rule's uploads, and its downloads, are the trained tensors and the head.

    Found from the sizes it declares for a small round, in each of its turns.
    """
    up = down = True
    for turn in range(2):
        frozen = rule.frozen(turn)
        sizes = AdapterRound(
            modules={"m": ModuleShape(d_in=101, d_out=1009)},
            head=17,
            ranks={"m": 3},
            received={"m": 3},
            limits=np.array([2, 3]),
            arrived=np.array([True, True]),
            frozen=frozen,
        )
        kinds: tuple[Frozen, ...] = ("a",) if rule.personal else sizes.trained
        messages = rule.messages(sizes)
        up &= bool((messages.up == sizes.up(*kinds)).all())
        start = messages.merge == 0 and not messages.renewed
        down &= start and bool((messages.down == sizes.down(*kinds)).all())
    return up, down


def _privacy_conflicts(recipe: Settings) -> Iterator[_Found]:
    rule, annealing = RULES[recipe.aggregation.rule], recipe.annealing
    full = annealing.mode == "full"
    if full or (annealing.mode == "staged" and _full_rounds(recipe) > 0):
        keys = ("annealing.mode",) if full else ("annealing.initiating.trainable", "annealing.mode")
        yield (
            ("privacy", *keys),
            "noise on every weight of a model leaves nothing to learn from; expected rounds of an"
            " adapter alone: annealing.initiating.trainable adapter or none, or mode fixed",
        )
    if not full and not rule.mean_only:
        fitting = ", ".join(name for name, each in RULES.items() if each.mean_only)
        yield (
            ("privacy", "aggregation.rule"),
            f"rule '{rule.name}' uses more of single clients than the mean of their tensors, which"
            f" is all that the noise protects; expected one of the rules {fitting}",
        )
    clients = recipe.clients
    if clients.sampler.name != "uniform":
        yield (
            ("privacy", "clients.sampler"),
            f"epsilon holds for clients drawn uniformly; expected uniform, got"
            f" {clients.sampler.name!r}",
        )
    if clients.weight.name not in ("examples", "uniform"):
        yield (
            ("privacy", "clients.weight"),
            "with privacy every client counts the same; expected uniform, got"
            f" {clients.weight.name!r}",
        )
    objective = OBJECTIVES[clients.objective.name]
    if objective.sends:
        yield (
            ("privacy", "clients.objective.name"),
            f"objective {objective.name!r} sends tensors beside the update, which are not clipped"
            " and get no noise; expected another objective",
        )
    if objective.steps_model:
        yield (
            ("privacy", "clients.objective.name"),
            f"objective {objective.name!r} steps the model by the number of updates that arrived,"
            " which gets no noise; expected another objective",
        )
    if recipe.simulates_time:
        yield (
            ("privacy", "clients.availability", "clients.over_select", "clients.deadline_s"),
            "epsilon holds for clients drawn uniformly; expected none that leave, are late or can"
            " be reached at some times only (no simulated time)",
        )


def _full_rounds(recipe: Settings) -> int:
    initiating = recipe.annealing.initiating
    return initiating.rounds if initiating.trainable == "full" else 0
