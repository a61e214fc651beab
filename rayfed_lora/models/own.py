"""Own models (`plugins.models.model`) as transformers' models. Source: this project."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    CausalLMOutput,
    ImageClassifierOutput,
    SequenceClassifierOutput,
)

from rayfed_lora.errors import ModelError
from rayfed_lora.plugins.models import FACTS
from rayfed_lora.plugins.registry import Method
from rayfed_lora.plugins.tables import MODELS
from rayfed_lora.recipe.model import AUTO_CLASSES

_REGISTERED: dict[str, Any] = {}


def register_all() -> None:
    """Tell transformers of the own models that this process knows."""
    for method in MODELS.methods():
        if _REGISTERED.get(method.name) is not method.target:
            _register(method)
            _REGISTERED[method.name] = method.target


def _register(method: Method[Any]) -> None:
    kind, task = method.name, method.value.task
    if kind in CONFIG_MAPPING and kind not in _REGISTERED:
        raise ModelError(f"model {kind!r}: transformers has a model of that name; choose another")
    defaults = {name: field.get_default() for name, field in method.options.model_fields.items()}

    class Config(PreTrainedConfig):  # type: ignore[misc]
        model_type = kind

        def __init__(self, **values: Any) -> None:
            for name, default in {**FACTS[task], **defaults}.items():
                setattr(self, name, values.pop(name, default))
            super().__init__(**values)

    generating = (GenerationMixin,) if task == "causal-lm" else ()

    class Model(PreTrainedModel, *generating):  # type: ignore[misc]
        config_class = Config
        base_model_prefix = "net"
        main_input_name = "pixel_values" if task == "image-classification" else "input_ids"
        forward = _FORWARD[task]

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            options = {name: getattr(config, name) for name in defaults}
            self.net = method.with_options(options).build(config)
            if not isinstance(self.net, nn.Module):
                raise TypeError(f"expected a torch.nn.Module, got {type(self.net).__name__}")
            outputs = config.vocab_size if task == "causal-lm" else config.num_labels
            self.own_head = _of_size(self.net, nn.Linear, "out_features", outputs)[-1:]
            self._tied_weights_keys = _tied(self.net)
            config.tie_word_embeddings = bool(self._tied_weights_keys)
            self.post_init()
            if self.can_generate():
                self.generation_config.use_cache = False

        def _init_weights(self, module: nn.Module) -> None:
            """Keep the weights that the builder drew."""

        def get_input_embeddings(self) -> nn.Module:
            size = getattr(self.config, "vocab_size", None)
            found = _of_size(self.net, nn.Embedding, "num_embeddings", size)
            if not found:
                raise NotImplementedError
            table: nn.Module = self.get_submodule(found[0])
            return table

        def get_output_embeddings(self) -> nn.Module | None:
            found = self.own_head if task == "causal-lm" else []
            return self.get_submodule(found[0]) if found else None

        def prepare_inputs_for_generation(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
        ) -> dict[str, Any]:
            """Return all tokens so far: own models keep no keys and values."""
            del rest
            return {"input_ids": input_ids, "attention_mask": attention_mask}

    name = re.sub(r"\W", "_", kind)
    Config.__name__ = Config.__qualname__ = f"{name}_config"
    Model.__name__ = Model.__qualname__ = name
    AutoConfig.register(kind, Config, exist_ok=True)
    getattr(transformers, AUTO_CLASSES[task]).register(Config, Model, exist_ok=True)


def _of_size(net: nn.Module, kind: type, attribute: str, size: int | None) -> list[str]:
    """Return the names of layers of a kind and size, as in the model around `net`."""
    return [
        f"net.{name}"
        for name, module in net.named_modules()
        if isinstance(module, kind) and getattr(module, attribute) == size
    ]


def _tied(net: nn.Module) -> dict[str, str]:
    """Return the names of parameters that have an earlier name, too, each with that one."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        earlier = first.setdefault(id(parameter), name)
        if earlier != name:
            tied[f"net.{name}"] = f"net.{earlier}"
    return tied


def _images(self: Any, pixel_values: Tensor, **rest: Any) -> ImageClassifierOutput:
    del rest
    return ImageClassifierOutput(logits=self.net(pixel_values))


def _texts(
    self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
) -> SequenceClassifierOutput:
    del rest
    return SequenceClassifierOutput(logits=self.net(input_ids, _mask(input_ids, attention_mask)))


def _language(
    self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any
) -> CausalLMOutput:
    del rest
    return CausalLMOutput(logits=self.net(input_ids, _mask(input_ids, attention_mask)))


def _mask(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids) if mask is None else mask


_FORWARD = {
    "image-classification": _images,
    "text-classification": _texts,
    "causal-lm": _language,
}
