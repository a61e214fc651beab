"""Load the weights of a source, and report how they fit the model.

Source: this project, on transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.models.labels import match_head
from rayfed_lora.models.wording import listed, where
from rayfed_lora.recipe.model import Model
from rayfed_lora.seeds import Purpose, torch_seed

_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class LoadReport:
    """What transformers reports about a source's weights; names are the model's own.

    Attributes:
        missing: tensors of the model that the source lacks, except tied ones.
        unexpected: tensors of the source that the model does not have.
        mismatched: shape in the source and in the model, by tensor.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def load_report(model: Model, config: Any, *, local_only: bool = False) -> LoadReport | None:
    """Return how the source's weights fit, from their names and shapes; no weight is read.

    Returns:
        None for the source `config`, and, if `local_only`, for weights that are not on this
        machine.

    Raises:
        ModelError: the weights cannot be read.
    """
    if model.source == "config":
        return None
    is_folder = Path(sources.location(model.source)).is_dir()
    try:
        # A copy, since loading changes the configuration.
        _, report = _load(
            model,
            copy.deepcopy(config),
            device_map="meta",
            local_files_only=local_only and not is_folder,
        )
    except ModelError as error:
        if local_only and not is_folder and isinstance(error.__cause__, OSError):
            return None
        raise
    return report


def _load(model: Model, config: Any, **options: Any) -> tuple[nn.Module, LoadReport]:
    with sources.attributed(where(model)):
        net, info = sources.auto_class(model).from_pretrained(
            sources.location(model.source),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    if info["error_msgs"]:
        raise ModelError(f"{where(model)}: {' '.join(info['error_msgs'])}")
    shapes = {name: (tuple(had), tuple(needed)) for name, had, needed in info["mismatched_keys"]}
    missing, unexpected = (sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    return net, LoadReport(tuple(missing), tuple(unexpected), dict(sorted(shapes.items())))


def build(model: Model, config: Any, seed: int, *, keep_head: bool = False) -> nn.Module:
    """Return the model of `build_and_list_random` alone."""
    net, _ = build_and_list_random(model, config, seed, keep_head=keep_head)
    return net


def build_and_list_random(
    model: Model, config: Any, seed: int, *, keep_head: bool = False
) -> tuple[nn.Module, frozenset[str]]:
    """Return the model in float32, and the names of its randomly initialised tensors.

    Args:
        model: the recipe's section.
        config: from `sources.configuration`.
        seed: the run's seed, which all random weights follow from.
        keep_head: keep a head whose classes have other names than the configuration's. Otherwise
            the tensors whose size depends on the classes are initialised again.

    Raises:
        ModelError: the weights cannot be read, or are not finite.
    """
    torch.manual_seed(torch_seed(seed, Purpose.MODEL_INIT))
    if model.source == "config":
        net = sources.randomly_initialised(model, config)
        return net, frozenset(name for name, _ in net.named_parameters())
    net, report = _load(model, config)
    random = {*report.missing, *report.mismatched}
    if model.task != "causal-lm" and not keep_head:
        labels = [config.id2label[i] for i in range(config.num_labels)]
        if match_head(model, labels).kind == "other":
            random |= _reinitialise_head(net, model, config, seed)
    _check_finite(net, where(model))
    return net.float(), frozenset(random)


def class_tensors(model: Model, config: Any) -> frozenset[str]:
    """Return the names of the parameters whose size depends on the number of classes."""
    larger = copy.deepcopy(config)
    larger.num_labels = config.num_labels + 1
    shapes = {name: p.shape for name, p in sources.skeleton(model, config).named_parameters()}
    others = sources.skeleton(model, larger).named_parameters()
    return frozenset(name for name, p in others if p.shape != shapes[name])


def _reinitialise_head(net: nn.Module, model: Model, config: Any, seed: int) -> frozenset[str]:
    """Replace the tensors trained for other classes by random weights; return their names."""
    names = class_tensors(model, config)
    torch.manual_seed(torch_seed(seed, Purpose.MODEL_INIT))
    with torch.no_grad():
        random = sources.randomly_initialised(model, config)
        for name in names:
            net.get_parameter(name).copy_(random.get_parameter(name))
    return names


def _check_finite(net: nn.Module, source: str) -> None:
    tensors: list[tuple[str, torch.Tensor]] = [*net.named_parameters()]
    tensors += [pair for pair in net.named_buffers() if pair[0].endswith(_RUNNING)]
    wrong = [name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise ModelError(
            f"{source}: expected finite weights, got NaN or infinity in {listed(wrong)}"
        )
