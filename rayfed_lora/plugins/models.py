"""Own models: functions that build an `nn.Module`. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from rayfed_lora.errors import PluginError
from rayfed_lora.plugins.tables import MODELS

Task = Literal["image-classification", "text-classification", "causal-lm"]
_OF_TEXTS: Mapping[str, Any] = {
    "vocab_size": 1000,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What a model's configuration has beside its options, by task: it follows from data and tokenizer.
FACTS: Mapping[str, Mapping[str, Any]] = {
    "image-classification": {"image_size": 8, "num_channels": 1},
    "text-classification": _OF_TEXTS,
    "causal-lm": _OF_TEXTS,
}


@dataclass(frozen=True)
class Builder:
    """A function that builds a model, and its options.

    Attributes:
        function: of the sizes that `model` describes, and of the options.
        task: value of `model.task`.
        options: as validated.
    """

    function: Callable[..., Any]
    task: Task
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, config: Any) -> Any:
        """Return the module for a configuration with the entries of `FACTS` and `num_labels`."""
        sizes: tuple[Any, ...]
        if self.task == "image-classification":
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            sizes = (config.num_channels, height, width, config.num_labels)
        elif self.task == "text-classification":
            sizes = (config.vocab_size, config.max_position_embeddings, config.num_labels)
        else:
            sizes = (config.vocab_size, config.max_position_embeddings)
        return self.function(*sizes, **self.options)


def model(
    name: str | None = None, *, task: Task = "image-classification"
) -> Callable[[Callable[..., Any]], Any]:
    """Register a model: a function of sizes that returns a `torch.nn.Module`.

    * Images: of (channels, height, width, classes). The module computes (batch, classes) logits of
      (batch, channels, height, width) pixels. Images need not be square: rows of n numbers are
      images of 1 x n floats.
    * `task="text-classification"`: of (vocabulary, length, classes). The module computes (batch,
      classes) logits of token ids and an attention mask, both (batch, tokens), where the mask is 0
      on padding and tokens <= length, which is `data.max_length`. `model.tokenizer` names the
      tokenizer.
    * `task="causal-lm"`: of (vocabulary, length). The module computes (batch, tokens, vocabulary)
      logits of the same two; those of a token may not depend on later ones.

    It is called under the run's seed, and on torch's meta device, too. Keyword-only parameters are
    its options: keys of the recipe's section `model`. Names of modules in recipes begin with
    `net.`; the head is the last linear layer with an output for each class (token), if there is
    one.

    Args:
        name: value of `model.source`; default: the function's, with hyphens.
        task: that it is for; a recipe that names the model and no `model.task` gets it.

    Raises:
        PluginError: the name is taken, an option is not typed, or the task is none of the three.
    """
    if task not in FACTS:
        raise PluginError(f"model: expected a task of {', '.join(FACTS)}, got {task!r}")

    def register(function: Callable[..., Any]) -> Any:
        value = partial(_builder, function=function, task=task)
        return MODELS.add(function, name, value=value, bind=_with_options)

    return register


def _builder(name: str, function: Callable[..., Any], task: Task) -> Builder:
    del name
    return Builder(function, task)


def _with_options(builder: Builder, options: Mapping[str, Any]) -> Builder:
    return replace(builder, options=options)
