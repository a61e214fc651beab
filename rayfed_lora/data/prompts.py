"""Prompts that a language model answers, and its answers. Source: this project."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Answer:
    """What a language model generated for a prompt.

    Attributes:
        example: place of the prompt among those that are asked.
        prompt, response: of the data, as texts.
        generated: by the model, without its end token.
    """

    example: int
    prompt: str
    response: str
    generated: str


@dataclass(frozen=True)
class PromptFacts:
    """What is known of the prompts that are asked, by their place.

    Attributes:
        count: number of prompts.
        clients: whose rows they are; None where the data do not say.
        domains: of column `domain`; None where there is none.
    """

    count: int
    clients: tuple[str, ...] | None = None
    domains: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Prompts:
    """The prompts of `evaluation.generate`.

    Attributes:
        ids: tokens of each prompt, (n,) int32.
        responses: tokens of the data's response to each, with its end token.
        facts: whose they are.
    """

    ids: tuple[npt.NDArray[np.int32], ...]
    responses: tuple[npt.NDArray[np.int32], ...]
    facts: PromptFacts
