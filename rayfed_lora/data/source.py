"""Data sets by name: the built-in ones and functions of users that return rows.

This module imports neither pyarrow nor pandas: recipes look up names here.

Source: this project.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from rayfed_lora import seeds
from rayfed_lora.errors import DataError
from rayfed_lora.plugins.tables import DATA

if TYPE_CHECKING:
    from rayfed_lora.data.raw_tables import RawData

_TEXT_TASKS = frozenset({"text-classification", "causal-lm"})


@dataclass(frozen=True)
class Source:
    """A function that returns rows, and its options.

    Attributes:
        name: value of `data.source`.
        function: of the options, and of a numpy generator where it has a positional parameter.
        task: of the models that the rows are for; None: whichever their columns fit.
        options: as validated.
    """

    name: str
    function: Callable[..., Any]
    task: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, seed: int) -> Any:
        """Return what the function returns under a run's seed; raises DataError where it fails."""
        try:
            if not _draws(self.function):
                return self.function(**self.options)
            return self.function(seeds.generator(seed, seeds.Purpose.DATA), **self.options)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"data {self.name!r} failed:\n{traceback.format_exc()}") from error

    def read(self, seed: int, labels: Sequence[str]) -> RawData:
        """Return the rows as tables; `labels`: names that the column of labels may have, in order.

        Raises:
            DataError: the function fails, or what it returns has no rows.
        """
        from rayfed_lora.data import memory
        from rayfed_lora.data.raw_tables import RawData

        rows = self.rows(seed)
        if isinstance(rows, RawData):
            return rows
        try:
            return memory.as_raw(memory.as_held(rows), labels)
        except DataError as error:
            raise DataError(f"what data {self.name!r} returned: {error}") from error

    def check_task(self, task: str, option: str) -> None:
        """Raise a DataError where the rows are for another task; texts are for both text tasks."""
        if self.task not in (None, task) and not {self.task, task} <= _TEXT_TASKS:
            raise DataError(f"{option} {self.name!r}: is for model.task {self.task}, got {task}")


def data(
    name: str | None = None, *, task: str | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Register a data set: a function of () or (rng) that returns rows.

    It returns a pandas DataFrame, a `datasets.Dataset` or `DatasetDict`, a pyarrow Table, a list of
    dicts, or a pair (train, test) of them, with columns as files have (`data.text_column` and so
    on). A positional parameter gets a numpy generator of the run's seed. The function is called
    once for a run, in the process that prepares the data, and again by a plan and by a resume:
    rows that are not those of the finished rounds end the latter. Keyword-only parameters are its
    options: keys of the recipe's section `data`.

    Args:
        name: value of `data.source`; default: the function's, with hyphens.
        task: `model.task` that the rows are for; None: not checked.

    Raises:
        PluginError: the name is taken, or an option is not typed.
    """

    def register(function: Callable[..., Any]) -> Any:
        value = partial(_source, function=function, task=task)
        return DATA.add(function, name, value=value, bind=_with_options)

    return register


def _draws(function: Callable[..., Any]) -> bool:
    """Return whether a function takes the generator: it has a positional parameter."""
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return any(p.kind is not keyword_only for p in inspect.signature(function).parameters.values())


def _source(name: str, function: Callable[..., Any], task: str | None) -> Source:
    return Source(name, function, task)


def _with_options(source: Source, options: Mapping[str, Any]) -> Source:
    return replace(source, options=options)


@data(task="image-classification")
def digits() -> RawData:
    """Handwritten digits of 8 x 8 pixels (UCI optical digits, the copy in scikit-learn)."""
    from rayfed_lora.data.builtin import read_digits

    return read_digits()


@data(task="text-classification")
def trec() -> RawData:
    """Questions by what they ask for (TREC, Li and Roth 2002)."""
    from rayfed_lora.data.builtin import read_trec

    return read_trec()


@data(task="text-classification")
def vader() -> RawData:
    """Snippets of four domains, positive or negative (Hutto and Gilbert 2014, ICWSM)."""
    from rayfed_lora.data.builtin import read_vader

    return read_vader()


@data(task="image-classification")
def fashion_mnist() -> RawData:
    """Clothes of 28 x 28 pixels with a test split (Xiao et al. 2017, arXiv:1708.07747)."""
    from rayfed_lora.data.builtin import read_fashion_mnist

    return read_fashion_mnist()


@data(task="causal-lm")
def short_tasks(
    *,
    train: Annotated[int, Field(ge=1, le=500)] = 50,
    test: Annotated[int, Field(ge=1, le=500)] = 10,
) -> RawData:
    """Instructions of six domains with answers of a few tokens; so many tasks a domain."""
    from rayfed_lora.data.short_tasks import read_short_tasks

    return read_short_tasks(train, test)
