"""The sizes of a model under an adapter, and whether its clients can be fused.

FLOPs, activations and the batch dimension come from a forward pass on the meta device.
Source: this project.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models.checkpointing import can_checkpoint, check_checkpointing, is_recomputed
from rayfed_lora.models.heads import head_modules, head_notes, head_parameters
from rayfed_lora.models.linear import is_linear, sides
from rayfed_lora.models.precision import shortened
from rayfed_lora.models.targets import Targets, choose_targets
from rayfed_lora.recipe.memory import HELD_PER_LINEAR_OUTPUT
from rayfed_lora.recipe.model import Adapter
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import ModelShape

# Examples traced; no text has a multiple of it as its length, to tell a sequence from a batch.
_EXAMPLES = 7
_WARNING = "warn_if_padding_and_no_attention_mask"
FIRST_DIMENSION = "the model does not keep a batch's examples in the first dimension"


def model_shape(net: nn.Module, recipe: Recipe) -> ModelShape:
    """Return the sizes of a model (real or on the meta device) under the recipe's adapter.

    Raises:
        ModelError: no module matches, a match is not a plain linear layer, or heating.rank
            exceeds the smallest side of a module, or its layers cannot be recomputed as the recipe
            says.
    """
    check_checkpointing(net, recipe.runtime.checkpoint_activations)
    trace = _traced(net, recipe)
    rank = 0 if recipe.annealing.mode == "full" else recipe.annealing.heating.rank
    targets = _targets(net, recipe.adapter, rank, trace.unused)
    modules = {name: sides(net.get_submodule(name)) for name in targets.names}
    for name, shape in modules.items():
        if rank > shape.max_rank:
            raise ModelError(
                f"annealing.heating.rank: expected at most {shape.max_rank}, the smaller side of"
                f" {name} ({shape.d_out} x {shape.d_in}), got {rank}"
            )
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    head = head_parameters(net, recipe.adapter)
    return ModelShape(
        modules,
        sum(sizes[name] for name in head),
        sum(sizes.values()),
        tuple(head),
        obstacle=fusion_obstacle(net, recipe.adapter) or trace.obstacle,
        linear_flops=trace.linear_flops,
        activation_bytes=trace.activation_bytes,
        logit_bytes=trace.logit_bytes,
        checkpointed_bytes=trace.checkpointed_bytes,
        notes=(*head_notes(net, recipe.adapter), *targets.notes),
        tensors={name: tuple(p.shape) for name, p in net.named_parameters()},
        stored_base_bytes=_stored_bytes(net, recipe, head),
    )


def _stored_bytes(net: nn.Module, recipe: Recipe, head: Collection[str]) -> int | None:
    """Return the bytes of the frozen base under `model.dtype`; None: of float32, or unknown."""
    if recipe.model.dtype != "bfloat16":
        return None
    short = shortened(net, head)
    frozen = [(name, p.numel()) for name, p in net.named_parameters() if name not in set(head)]
    return sum(count * (2 if name in short else 4) for name, count in frozen)


def _targets(net: nn.Module, adapter: Adapter, rank: int, unused: frozenset[str]) -> Targets:
    """Return the adapted modules; rank 0: there may be none, since no factors are trained."""
    head = head_modules(net, adapter)
    try:
        found = choose_targets(net, adapter.target_modules, head, rank=rank, unused=unused)
    except ModelError:
        if rank > 0 or adapter.target_modules not in ("auto", "all-linear"):
            raise
        return Targets([])
    # Without factors, notes on modules that get none are irrelevant.
    return found if rank > 0 else Targets(found.names)


def adapted_modules(net: nn.Module, adapter: Adapter) -> list[str]:
    """Return the full names of the modules that can get factors of any rank, in model order."""
    return choose_targets(net, adapter.target_modules, head_modules(net, adapter)).names


def fusion_obstacle(net: nn.Module, adapter: Adapter) -> str | None:
    """Return why this model cannot compute several clients in one batch; None where it can.

    Batch normalisation would mix the clients. A trained head is copied for each client, which is
    implemented for linear layers only.
    """
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name} ({type(module).__name__}) normalises over the examples of a batch"
    if adapter.train_biases:
        return "every bias is trained (adapter.train_biases), in layers of all kinds"
    for name in head_parameters(net, adapter):
        owner = name.rpartition(".")[0]
        module = net.get_submodule(owner)
        if type(module) is not nn.Linear:
            return f"the head's {owner} is {type(module).__name__}, not nn.Linear"
    return None


@dataclass(frozen=True)
class _Trace:
    """The results of a forward pass, as in a `ModelShape`; `unused` layers are not called."""

    obstacle: str | None = None
    linear_flops: float = 0.0
    activation_bytes: int = 0
    unused: frozenset[str] = frozenset()
    logit_bytes: int = 0
    checkpointed_bytes: int = 0


def _traced(net: nn.Module, recipe: Recipe) -> _Trace:
    """Return the results of a forward pass of a model on the meta device; others are not traced.

    A pass that raises is an obstacle: a model may keep its examples in another dimension than the
    first, and clients would be mixed up silently.
    """
    if any(p.device.type != "meta" for p in net.parameters()):
        return _Trace()
    rows: list[int] = []
    flops: list[float] = []
    outputs: list[int] = []
    called: set[nn.Module] = set()
    # Of each layer that can be recomputed: values of its result, and of its linear layers.
    kept: list[int] = []
    inside: list[int] = []

    def record(module: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        called.add(module)
        if isinstance(out, torch.Tensor):  # a subclass may return something else
            rows.append(args[0].shape[0])
            flops.append(2.0 * args[0].numel() * out.shape[-1])
            outputs.append(out.numel())

    def recomputed(module: nn.Module, args: object, out: Any) -> None:
        kept.append((out if isinstance(out, torch.Tensor) else out[0]).numel())
        inside.append(sum(outputs) - sum(inside))

    linear = {name: module for name, module in net.named_modules() if is_linear(module)}
    with ExitStack() as stack:
        for module in linear.values():
            stack.enter_context(module.register_forward_hook(record))
        for module in filter(is_recomputed, net.modules() if can_checkpoint(net) else ()):
            stack.enter_context(module.register_forward_hook(recomputed))
        try:
            with torch.no_grad(), no_padding_warning(net):
                logits = net.eval()(**_inputs(net, recipe)).logits
        except Exception as error:  # some models read values, which do not exist here
            return _Trace(f"its forward pass cannot be traced ({type(error).__name__})")
    unused = frozenset(name for name, module in linear.items() if module not in called)
    if any(count % _EXAMPLES != 0 for count in rows):
        return _Trace(FIRST_DIMENSION, unused=unused)
    mean = sum(flops) / max(len(flops), 1) / _EXAMPLES
    again = sum(kept) + HELD_PER_LINEAR_OUTPUT * max(inside, default=0)
    return _Trace(
        None,
        mean,
        4 * sum(outputs) // _EXAMPLES,
        unused,
        logit_bytes=4 * logits.numel() // _EXAMPLES if logits.dim() == 3 else 0,
        checkpointed_bytes=4 * again // _EXAMPLES,
    )


@contextmanager
def no_padding_warning(net: nn.Module) -> Iterator[None]:
    """Disable a check of transformers that reads the values of tokens."""
    own = [module for module in net.modules() if hasattr(module, _WARNING)]
    for module in own:
        setattr(module, _WARNING, lambda *_, **__: None)
    try:
        yield
    finally:
        for module in own:
            delattr(module, _WARNING)  # shows the class's own method again


def image_shape(config: Any) -> tuple[int, int, int]:
    """Return a configuration's (channels, height, width); without a size: AttributeError."""
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
        ids = torch.zeros((_EXAMPLES, length), dtype=torch.long, device="meta")
        return {"input_ids": ids}
    return {"pixel_values": torch.zeros((_EXAMPLES, *image_shape(config)), device="meta")}
