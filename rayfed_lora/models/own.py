"""Own models (`plugins.models.model`) as transformers' models. Source: this project."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput

from rayfed_lora.errors import ModelError
from rayfed_lora.plugins.registry import Method
from rayfed_lora.plugins.tables import MODELS

_REGISTERED: dict[str, Any] = {}


def register_all() -> None:
    """Tell transformers of the own models that this process knows."""
    for method in MODELS.methods():
        if _REGISTERED.get(method.name) is not method.target:
            _register(method)
            _REGISTERED[method.name] = method.target


def _register(method: Method[Any]) -> None:
    kind = method.name
    if kind in CONFIG_MAPPING and kind not in _REGISTERED:
        raise ModelError(f"model {kind!r}: transformers has a model of that name; choose another")
    defaults = {name: field.get_default() for name, field in method.options.model_fields.items()}

    class Config(PreTrainedConfig):  # type: ignore[misc]
        model_type = kind

        def __init__(self, image_size: Any = 8, num_channels: int = 1, **values: Any) -> None:
            self.image_size, self.num_channels = image_size, num_channels
            for name, default in defaults.items():
                setattr(self, name, values.pop(name, default))
            super().__init__(**values)

    class Model(PreTrainedModel):  # type: ignore[misc]
        config_class = Config
        base_model_prefix = "net"
        main_input_name = "pixel_values"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            options = {name: getattr(config, name) for name in defaults}
            classes = config.num_labels
            build = method.with_options(options)
            self.net = build(config.num_channels, height, width, classes)
            if not isinstance(self.net, nn.Module):
                raise TypeError(f"expected a torch.nn.Module, got {type(self.net).__name__}")
            heads = [
                f"net.{name}"
                for name, module in self.net.named_modules()
                if isinstance(module, nn.Linear) and module.out_features == classes
            ]
            self.own_head = heads[-1:]
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Keep the weights that the builder drew."""

        def forward(self, pixel_values: Tensor, **rest: Any) -> ImageClassifierOutput:
            del rest
            return ImageClassifierOutput(logits=self.net(pixel_values))

    name = re.sub(r"\W", "_", kind)
    Config.__name__ = Config.__qualname__ = f"{name}_config"
    Model.__name__ = Model.__qualname__ = name
    AutoConfig.register(kind, Config, exist_ok=True)
    AutoModelForImageClassification.register(Config, Model, exist_ok=True)
