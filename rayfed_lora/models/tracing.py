"""A forward pass on the meta device, and its results. Source: this project."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayfed_lora.models.linear import is_linear
from rayfed_lora.recipe.recipe import Recipe

# No text is traced at a length that is a multiple of it, to tell a sequence from a batch.
_EXAMPLES = 7
_WARNING = "warn_if_padding_and_no_attention_mask"
FIRST_DIMENSION = "the model does not keep a batch's examples in the first dimension"


@dataclass(frozen=True)
class ForwardTrace:
    """The results of a forward pass on the meta device.

    Attributes:
        obstacle: why several clients cannot be computed in one batch; None: they can.
        linear_flops: mean forward FLOPs of a linear layer for one example, 0 where unknown.
        activation_bytes: size of the linear layers' outputs for one example, in float32.
        unused: linear layers that the pass does not call.
    """

    obstacle: str | None = None
    linear_flops: float = 0.0
    activation_bytes: int = 0
    unused: frozenset[str] = frozenset()


def trace_forward(net: nn.Module, recipe: Recipe) -> ForwardTrace:
    """Return the results of a forward pass of a model on the meta device.

    A pass that raises is an obstacle: a model may keep its examples in another dimension than the
    first, and clients would be mixed up silently. A real model is not traced.
    """
    if any(p.device.type != "meta" for p in net.parameters()):
        return ForwardTrace()
    rows: list[int] = []
    flops: list[float] = []
    outputs: list[int] = []
    called: set[nn.Module] = set()

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        called.add(module)
        if isinstance(out, torch.Tensor):  # a subclass may return something else
            rows.append(args[0].shape[0])
            flops.append(2.0 * args[0].numel() * out.shape[-1])
            outputs.append(out.numel())

    linear = {name: module for name, module in net.named_modules() if is_linear(module)}
    with ExitStack() as stack:
        for module in linear.values():
            stack.enter_context(module.register_forward_hook(record))
        try:
            with torch.no_grad(), _no_padding_warning(net):
                net.eval()(**_inputs(net, recipe))
        except Exception as error:  # some models read values, which do not exist here
            return ForwardTrace(f"its forward pass cannot be traced ({type(error).__name__})")
    unused = frozenset(name for name, module in linear.items() if module not in called)
    if any(count % _EXAMPLES != 0 for count in rows):
        return ForwardTrace(FIRST_DIMENSION, unused=unused)
    mean = sum(flops) / max(len(flops), 1) / _EXAMPLES
    return ForwardTrace(None, mean, 4 * sum(outputs) // _EXAMPLES, unused)


@contextmanager
def _no_padding_warning(net: nn.Module) -> Iterator[None]:
    """Disable a check of transformers that reads the values of tokens."""
    own = [module for module in net.modules() if hasattr(module, _WARNING)]
    for module in own:
        setattr(module, _WARNING, lambda *_, **__: None)
    try:
        yield
    finally:
        for module in own:
            # The class's own method is visible again.
            delattr(module, _WARNING)


def image_shape(config: Any) -> tuple[int, int, int]:
    """Return the (channels, height, width) of the images that a configuration describes.

    Raises:
        AttributeError: the configuration has no image size.
    """
    if not hasattr(config, "image_size") and hasattr(config, "vision_config"):
        config = config.vision_config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), height, width


def _inputs(net: nn.Module, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Return inputs on the meta device; texts have the greatest length possible."""
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
