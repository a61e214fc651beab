"""Greedy answers to the prompts of the test split.

Source: this project, on transformers' generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from rayfed_lora.data.prompts import Answer, PromptFacts, Prompts
from rayfed_lora.errors import DataError
from rayfed_lora.models.adapted import AdaptedModel
from rayfed_lora.models.answering import greedy
from rayfed_lora.models.tokenizer import read_tokenizer
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.seeds import Purpose, generator
from rayfed_lora.tasks.messages import Generate
from rayfed_lora.training.device import memory_watched
from rayfed_lora.training.texts import ids_of, masks_of

IntArray = npt.NDArray[np.int32]


def prompts_of(table: pa.Table, recipe: Recipe) -> Prompts:
    """Return prompts and responses of some test rows, drawn from the seed: the last turn of each.

    Raises:
        DataError: no row has a response that is whole.
    """
    settings = recipe.evaluation.generate
    if settings is None:
        raise ValueError("need evaluation.generate")
    found = []
    for row, (ids, counted) in enumerate(zip(ids_of(table), masks_of(table), strict=True)):
        cut = len(ids) >= recipe.data.max_length
        first, last = _last_run(counted)
        # A response that ends with the row may have lost its end.
        if 0 < first < last and not (cut and last == len(ids)):
            found.append((row, ids[:first], ids[first:last]))
    if not found:
        raise DataError(
            "evaluation.generate: expected test rows with a whole response, got none; raise"
            " data.max_length"
        )
    if settings.examples != "all" and settings.examples < len(found):
        rng = generator(recipe.seed, Purpose.GENERATION)
        chosen = np.sort(rng.choice(len(found), settings.examples, replace=False))
        found = [found[i] for i in chosen.tolist()]
    rows = [row for row, _, _ in found]

    def groups(column: str) -> tuple[str, ...] | None:
        if column not in table.column_names:
            return None
        return tuple(map(str, table[column].take(rows).to_pylist()))

    facts = PromptFacts(len(found), groups("client"), groups("domain"))
    return Prompts(tuple(p for _, p, _ in found), tuple(r for _, _, r in found), facts)


def _last_run(counted: IntArray) -> tuple[int, int]:
    """Return the edges of the last tokens that count; (0, 0) without any.

    >>> _last_run(np.array([0, 1, 1, 0, 1, 1, 0]))
    (4, 6)
    """
    places = np.flatnonzero(counted)
    if len(places) == 0:
        return 0, 0
    last = int(places[-1]) + 1
    gaps = np.flatnonzero(counted[:last] == 0)
    return (int(gaps[-1]) + 1 if len(gaps) else 0), last


@dataclass
class Generating:
    """Lets a trainer's model answer prompts; the tokenizer is read when it is first needed."""

    recipe: Recipe
    prompts: Prompts
    model: AdaptedModel
    _tokenizer: Any = None

    @torch.no_grad()
    def answers(self, task: Generate) -> tuple[Answer, ...]:
        """Return the greedy answers to some prompts, batch by batch.

        Raises:
            BlockMemoryError: they do not fit into memory.
        """
        if self._tokenizer is None:
            self._tokenizer = read_tokenizer(self.recipe.model)
        found: list[Answer] = []
        for shard in task.shards:
            self.model.show(task.model)
            self.model.train(False)
            places = [*range(self.prompts.facts.count)][shard]
            with memory_watched(f"{len(places)} prompts do not fit into memory"):
                texts = self._generated([self.prompts.ids[place] for place in places])
            for place, text in zip(places, texts, strict=True):
                prompt, response = self.prompts.ids[place], self.prompts.responses[place]
                found.append(Answer(place, self._text(prompt), self._text(response), text))
        return tuple(found)

    def _generated(self, prompts: Sequence[IntArray]) -> list[str]:
        settings, ends = self.recipe.evaluation.generate, self._ends()
        if settings is None:
            raise ValueError("need evaluation.generate")
        most = settings.max_new_tokens
        found = greedy(self.model.net, prompts, ends, most, self.model.device)
        return [self._text(ids) for ids in found]

    def _ends(self) -> list[int]:
        """Return the tokens that end a response: the tokenizer's, and the last ones of the data."""
        own = self._tokenizer.eos_token_id
        of_data = sorted({int(response[-1]) for response in self.prompts.responses})
        special = {*self._tokenizer.all_special_ids}
        ends = [token for token in of_data if token in special]
        return list(dict.fromkeys([*ends, *([] if own is None else [own])])) or of_data[:1]

    def _text(self, ids: npt.NDArray[Any]) -> str:
        text: str = self._tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)
        return text
