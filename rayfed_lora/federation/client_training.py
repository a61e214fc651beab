"""The training of a round's clients: the task that starts it, and the updates it gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from rayfed_lora.aggregation.means import Means
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.data.client_numbers import ClientSettings
from rayfed_lora.errors import ClientError, InterruptedRunError, RunError
from rayfed_lora.federation import sampling
from rayfed_lora.federation.cohorts import Cohort
from rayfed_lora.federation.learning_rate import learning_rate
from rayfed_lora.federation.sampling import BlockSize
from rayfed_lora.federation.transitions import Start, make_read_only
from rayfed_lora.objectives.remembered import Remembered
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.engine import IndexArray, Population, Running
from rayfed_lora.tasks.messages import Personal, Train, Trained
from rayfed_lora.types import ClientReport, LocalPlan, RoundPlan
from rayfed_lora.wire.upload import Upload, downloaded, is_sent


@dataclass(frozen=True)
class Updates:
    """The updates of a round's clients.

    Attributes:
        reports: one per client, in the order of the cohort.
        means: of the usable updates; None where no client came in time.
        reruns: how often a block was rerun because a worker or a result was lost.
        joining_s: seconds in which the server joined means.
    """

    reports: tuple[ClientReport, ...]
    means: Means | None
    reruns: int
    joining_s: float

    @property
    def usable(self) -> list[bool]:
        """(cohort,) whether the update arrived and can be used."""
        return [report.usable for report in self.reports]


class ClientTraining:
    """Makes the training task of each round and collects its updates."""

    def __init__(
        self,
        recipe: Recipe,
        population: Population,
        limits: IndexArray | None,
        should_stop: Callable[[], bool],
        tell: Callable[[Sequence[ClientReport]], None],
    ) -> None:
        """Decide how many clients are trained together.

        Args:
            recipe: the run.
            population: as the engine's `open` returned it.
            limits: largest rank of each client, where any is limited.
            should_stop: asked between parts; once true, the round is abandoned.
            tell: told of new reports.
        """
        self._recipe = recipe
        self._sizes = population.devices.sizes
        self._limits = limits
        self._should_stop = should_stop
        self._tell = tell
        self._malicious = sampling.attackers(recipe, population.clients)
        self._settings = ClientSettings.of(recipe, population.devices)
        cohort, batch = recipe.cohort_size(population.clients), self._settings.most_examples
        # Of an adapter round.
        self.block_size = sampling.block_size(
            recipe, population.shape, cohort, population.device, batch
        )

    def local_plan(self, plan: RoundPlan, cohort: Cohort) -> LocalPlan:
        """Return the settings that the clients of a round are sent."""
        rate = partial(learning_rate, self._recipe, plan.round)
        return LocalPlan(
            plan.round,
            plan.trainable,
            rate(self._settings.mean_lr),
            plan.proximal_weight,
            cohort.facts.frozen,
            tolerant=self._recipe.most_failed(len(cohort.clients)) > 0,
            own=self._settings.by_client(cohort.clients, rate),
        )

    def task(
        self,
        local: LocalPlan,
        start: Start,
        cohort: Cohort,
        personal: Personal,
        remembered: Remembered,
    ) -> Train:
        """Return the training of a round.

        Args:
            local: its settings.
            start: its model.
            cohort: its clients.
            personal: of clients that have a B of their own.
            remembered: the objective and the memory of all clients.
        """
        full, recipe = local.trainable == "full", self._recipe
        rule = RULES[recipe.aggregation.rule]
        model, down = start.model, recipe.wire.down.named
        seen = downloaded(
            model.state,
            down,
            recipe.seed,
            local.round,
            lambda name: is_sent(name, local.frozen, rule.personal),
        )
        if seen is not None:
            make_read_only(seen)
            model = replace(model, sent=seen)
        size = BlockSize(1, even=True) if full else self.block_size
        limits = None if full else self._limits
        make_read_only(start.model.state)
        return Train(
            model,
            local.of(cohort.present),
            self._recipe.aggregation.rule,
            tuple(sampling.blocks(cohort.present, size)),
            {} if limits is None else {k: int(limits[k]) for k in cohort.present},
            {} if full else {k: personal[k] for k in cohort.present if k in personal},
            remembered.of(cohort.present),
            upload=self._upload(cohort, seen=seen is not None),
        )

    def _upload(self, cohort: Cohort, *, seen: bool) -> Upload | None:
        """Return what happens to the updates of a round; None: nothing.

        `seen`: whether clients see another state than the server's after the download.
        """
        recipe, codec, attack = self._recipe, self._recipe.wire.up.named, None
        malicious = self._malicious.intersection(cohort.present)
        if recipe.clients.attack is not None and malicious:
            found = recipe.clients.attack.named
            attack = found if found.method().acts_on == "tensors" else None
        privacy = recipe.privacy
        if codec.method().lossless and attack is None and privacy is None and not seen:
            return None
        return Upload(
            recipe.seed,
            attack=attack,
            malicious=frozenset() if attack is None else malicious,
            clip=None if privacy is None else privacy.clip,
            codec=codec,
            uniform=privacy is not None,
            error_feedback=recipe.wire.up.error_feedback,
        )

    def collect(self, training: Running[Trained], cohort: Cohort, t: int) -> Updates:
        """Collect the parts of the cohort's training in round `t` as they arrive.

        Raises:
            InterruptedRunError: the run is to stop.
            ClientError: more clients raised than `clients.max_failed` allows.
            RunError: clients answered, but none with a usable update.
        """
        means = RULES[self._recipe.aggregation.rule].means()
        reports: list[ClientReport] = []
        joining_s = 0.0
        try:
            while training.pending:
                trained = training.pending.popleft().result()
                if self._should_stop():
                    raise InterruptedRunError("stopped; the round was abandoned")
                # A training that raised does not report the number of examples.
                new = [
                    r if r.trace is None else replace(r, examples=int(self._sizes[r.client]))
                    for r in trained.reports
                ]
                self._tell(new)
                for report in new:
                    reports.append(report)
                    if report.trace is not None:
                        self._check_raised(reports, cohort, t)
                began = time.perf_counter()
                means.join(trained.means)
                joining_s += time.perf_counter() - began
        finally:
            training.cancel()
        if reports and not any(report.usable for report in reports):
            reasons = sorted({str(report.error) for report in reports})
            raise RunError(
                f"round {t + 1}: none of {len(reports)} clients sent a usable update;"
                f" {'; '.join(reasons[:3])}"
            )
        found = self._with_absent(reports, cohort)
        return Updates(tuple(found), means if reports else None, training.reruns(), joining_s)

    def _check_raised(self, reports: Sequence[ClientReport], cohort: Cohort, t: int) -> None:
        """End the run where more clients of a round raised than allowed."""
        raised = [report for report in reports if report.trace is not None]
        most = self._recipe.most_failed(len(cohort.clients))
        if len(raised) > most:
            last = raised[-1]
            why = f"{len(raised)} clients of the round failed, clients.max_failed allows {most}"
            raise ClientError(last.client, t, f"{last.trace}\n{why}")

    def _with_absent(self, reports: list[ClientReport], cohort: Cohort) -> list[ClientReport]:
        """Return the reports of a cohort, with those of clients that left or came too late."""
        if cohort.turnout is None:
            return reports
        absent = [
            ClientReport(client, int(self._sizes[client]), float("nan"), 0.0, absent=absence)
            for client, absence in cohort.turnout.absences.items()
        ]
        self._tell(absent)
        found = {report.client: report for report in (*reports, *absent)}
        return [found[client] for client in cohort.clients]
