"""Scores of a language model's answers to the prompts of the test split.

Source: exact match and ROUGE-L as of Lin 2004 (ROUGE, W04-1013): F1 of the longest common
subsequence of words, in small letters, without punctuation.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rayfed_lora.data.prompts import Answer, PromptFacts

_WORD = re.compile(r"[^\W_]+")


def exact_match(answer: Answer) -> bool:
    """Return whether an answer is the response, but for white space at its ends."""
    return answer.generated.strip() == answer.response.strip()


def rouge_l(generated: str, response: str) -> float:
    """Return 2 L / (n + m), L the longest common subsequence of n and m words; 0 without words.

    >>> rouge_l("the cat sat", "The cat, it sat.")
    0.8571428571428571
    >>> rouge_l("", "a"), rouge_l("a b", "b a")
    (0.0, 0.5)
    """
    one, other = (_WORD.findall(text.lower()) for text in (generated, response))
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for j, of in enumerate(other, start=1):
            above = row[j]
            row[j] = before + 1 if word == of else max(above, row[j - 1])
            before = above
    return 2 * row[-1] / (len(one) + len(other))


def scores(answers: Sequence[Answer]) -> dict[str, float]:
    """Return the means of one or more answers, as columns `eval_...` of rounds have them."""
    overlaps = [rouge_l(answer.generated, answer.response) for answer in answers]
    return {
        "exact_match": sum(map(exact_match, answers)) / len(answers),
        "rouge_l": math.fsum(overlaps) / len(answers),
    }


def scored(answers: Sequence[Answer], facts: PromptFacts) -> dict[str, Any]:
    """Return the number of answers and their scores, of all and, where known, by group."""
    found: dict[str, Any] = {"examples": len(answers), **scores(answers)}
    for name, groups in (("by_client", facts.clients), ("by_domain", facts.domains)):
        if groups is not None:
            found[name] = {
                group: {"examples": len(own), **scores(own)}
                for group, own in _grouped(answers, groups).items()
            }
    return found


def _grouped(answers: Iterable[Answer], groups: Sequence[str]) -> Mapping[str, list[Answer]]:
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(groups[answer.example], []).append(answer)
    return {group: found[group] for group in sorted(found)}
