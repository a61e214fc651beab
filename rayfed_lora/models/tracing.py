"""What a forward pass without values shows of a model. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayfed_lora.models.linear import is_linear
from rayfed_lora.recipe.recipe import Recipe


@dataclass(frozen=True)
class Trace:
    """What one forward pass without values shows of a model.

    Attributes:
        obstacle: as of `fusion_obstacle`.
        linear_flops: mean work of a linear layer for one example, forward, 0 where unknown.
        activation_bytes: what the linear layers give out for one example, in float32.
        unused: linear layers that the pass does not call.
    """

    obstacle: str | None = None
    linear_flops: float = 0.0
    activation_bytes: int = 0
    unused: frozenset[str] = frozenset()


# No text is traced at a length that is a multiple of it: a sequence is told from a batch.
_EXAMPLES = 7
_WARNING = "warn_if_padding_and_no_attention_mask"


def traced(net: nn.Module, recipe: Recipe) -> Trace:
    """Return what a forward pass of a model on the meta device shows; nothing for a real one.

    Without that proof clients are not computed together: a model may keep its examples elsewhere
    than in the first dimension, and would mix them up silently.
    """
    if any(p.device.type != "meta" for p in net.parameters()):
        return Trace()
    rows: list[int] = []
    flops: list[float] = []
    given: list[int] = []

    called: set[nn.Module] = set()

    def look(module: nn.Module, seen: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        called.add(module)
        if not isinstance(out, torch.Tensor):
            # A layer with a forward of its own.
            return
        rows.append(seen[0].shape[0])
        flops.append(2.0 * seen[0].numel() * out.shape[-1])
        given.append(out.numel())

    linear = {name: module for name, module in net.named_modules() if is_linear(module)}
    hooks = [module.register_forward_hook(look) for module in linear.values()]
    try:
        with torch.no_grad(), _no_look_at_padding(net):
            net.eval()(**_inputs(net, recipe))
    except Exception as error:  # some models look at values, which there are none of
        return Trace(f"its forward pass cannot be traced ({type(error).__name__})")
    finally:
        for hook in hooks:
            hook.remove()
    unused = frozenset(name for name, module in linear.items() if module not in called)
    if any(count % _EXAMPLES != 0 for count in rows):
        return Trace(
            "the model does not keep a batch's examples in the first dimension", unused=unused
        )
    mean = sum(flops) / max(len(flops), 1) / _EXAMPLES
    return Trace(None, mean, 4 * sum(given) // _EXAMPLES, unused)


@contextmanager
def _no_look_at_padding(net: nn.Module) -> Iterator[None]:
    """Keep transformers from a warning for which it looks at tokens, which have no values here."""
    own = [module for module in net.modules() if hasattr(module, _WARNING)]
    for module in own:
        setattr(module, _WARNING, lambda *_, **__: None)
    try:
        yield
    finally:
        for module in own:
            # Behind it is that of the class.
            delattr(module, _WARNING)


def image_shape(config: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a configuration is for.

    Raises:
        AttributeError: it names no size.
    """
    if not hasattr(config, "image_size") and hasattr(config, "vision_config"):
        config = config.vision_config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _inputs(net: nn.Module, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return inputs without values, as long as a text can be."""
    config: Any = net.config
    if recipe.model.task != "image-classification":
        positions = getattr(config, "max_position_embeddings", None) or 0
        longest = recipe.data.max_length
        length = min(longest, positions) if positions > 0 else longest
        if length % _EXAMPLES == 0:
            length -= 1
        shape = (_EXAMPLES, length)
        return {"input_ids": torch.zeros(shape, dtype=torch.long, device="meta")}
    return {"pixel_values": torch.zeros((_EXAMPLES, *image_shape(config)), device="meta")}
