"""Load the weights of a source, and report how they fit. Source: this project, on transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models import sources
from rayfed_lora.models.labels import HeadMatch, matched, names_in
from rayfed_lora.recipe.model import Model
from rayfed_lora.seeds import Purpose, torch_seed

_RUNNING = ("running_mean", "running_var")
# How many names a message lists.
_LISTED = 4


@dataclass(frozen=True)
class Loading:
    """What transformers reports of a source's weights; names are the model's own.

    Attributes:
        missing: tensors of the model that the source lacks; tied ones are not missing.
        unexpected: tensors of the source that the model does not know.
        mismatched: size in the source and in the model, by tensor.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def loading(model: Model, config: Any, *, here_only: bool = False) -> Loading | None:
    """Return how the source's weights fit, from their names and sizes; no weight is read.

    Args:
        model: the recipe's section.
        config: from `configuration`.
        here_only: download nothing.

    Returns:
        None for the source `config`, or where nothing may be downloaded and nothing is here.

    Raises:
        ModelError: the weights cannot be read.
    """
    if model.source == "config":
        return None
    local = Path(sources.location(model.source)).is_dir()
    try:
        # A copy: loading leaves its traces.
        _, told = _from_source(
            model,
            copy.deepcopy(config),
            device_map="meta",
            local_files_only=here_only and not local,
        )
    except ModelError as error:
        if here_only and not local and isinstance(error.__cause__, OSError):
            return None
        raise
    return told


def _from_source(model: Model, config: Any, **how: Any) -> tuple[nn.Module, Loading]:
    try:
        with sources.quiet():
            net, told = sources.auto_class(model).from_pretrained(
                sources.location(model.source),
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **how,
            )
    except Exception as error:  # as for configurations
        raise ModelError(f"{sources.where(model)}: {sources.message(error)}") from error
    if told["error_msgs"]:
        raise ModelError(f"{sources.where(model)}: {' '.join(told['error_msgs'])}")
    sizes = {name: (tuple(had), tuple(needed)) for name, had, needed in told["mismatched_keys"]}
    missing, unexpected = (sorted(told[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    return net, Loading(tuple(missing), tuple(unexpected), dict(sorted(sizes.items())))


def head_match(model: Model, labels: Sequence[str]) -> tuple[HeadMatch, tuple[str, ...]]:
    """Return how the classes of the source's head relate to the data's, and the head's names.

    Names that the recipe gives in `model.config.id2label` win over the source's own.

    Args:
        model: the recipe's section.
        labels: name of each class of the data.

    Raises:
        ModelError: the source's configuration cannot be read, or the recipe names other classes
            than the data's.
    """
    own = model.config.get("id2label")
    if own:
        names = names_in({"id2label": own}) or ()
        found = matched(names, labels)
        # transformers' own default says nothing of the classes.
        generic = all(name.startswith("LABEL_") for name in names)
        if found.kind == "other" or (found.kind == "unknown" and not generic):
            raise ModelError(
                f"model.config.id2label: expected the data's classes, {listed(labels)}, got"
                f" {listed(names)}"
            )
        return found, names
    if model.source == "config":
        return matched(None, labels), ()
    plain = model.model_copy(update={"config": {}})
    names = names_in(sources.configuration(plain, {}).to_dict()) or ()
    return matched(names or None, labels), names


def build(model: Model, config: Any, seed: int, *, keep_head: bool = False) -> nn.Module:
    """Return the model in float32, new weights (all, or the head's) drawn from the run's seed.

    Raises:
        ModelError: the weights cannot be read.
    """
    net, _ = built(model, config, seed, keep_head=keep_head)
    return net


def built(
    model: Model, config: Any, seed: int, *, keep_head: bool = False
) -> tuple[nn.Module, frozenset[str]]:
    """Return what `build` does, and the names of the tensors that are not the source's.

    Args:
        model: the recipe's section.
        config: from `configuration`.
        seed: the run's seed.
        keep_head: keep a head whose classes have other names than the configuration's; without
            it, the tensors whose size depends on the classes are drawn anew.

    Raises:
        ModelError: the weights cannot be read.
    """
    torch.manual_seed(torch_seed(seed, Purpose.MODEL_INIT))
    if model.source == "config":
        try:
            with sources.quiet():
                net = sources.auto_class(model).from_config(config)
        except Exception as error:  # as for configurations
            raise ModelError(f"{sources.where(model)}: {sources.message(error)}") from error
        return net.float(), frozenset(name for name, _ in net.named_parameters())
    net, told = _from_source(model, config)
    drawn = {*told.missing, *told.mismatched}
    if model.task != "causal-lm" and not keep_head:
        labels = [config.id2label[i] for i in range(config.num_labels)]
        if head_match(model, labels)[0].kind == "other":
            drawn |= _draw_anew(net, model, config, seed)
    _check_finite(net, sources.where(model))
    return net.float(), frozenset(drawn)


def class_tensors(model: Model, config: Any) -> frozenset[str]:
    """Return the names of the parameters whose size depends on the number of classes."""
    more = copy.deepcopy(config)
    more.num_labels = config.num_labels + 1
    sizes = {name: p.shape for name, p in sources.skeleton(model, config).named_parameters()}
    other = sources.skeleton(model, more).named_parameters()
    return frozenset(name for name, p in other if p.shape != sizes[name])


def _draw_anew(net: nn.Module, model: Model, config: Any, seed: int) -> frozenset[str]:
    """Replace what is trained for other classes by new weights; return its names."""
    names = class_tensors(model, config)
    torch.manual_seed(torch_seed(seed, Purpose.MODEL_INIT))
    with sources.quiet(), torch.no_grad():
        fresh = sources.auto_class(model).from_config(config)
        for name in names:
            net.get_parameter(name).copy_(fresh.get_parameter(name))
    return names


def _check_finite(net: nn.Module, where: str) -> None:
    tensors: list[tuple[str, torch.Tensor]] = [*net.named_parameters()]
    tensors += [pair for pair in net.named_buffers() if pair[0].endswith(_RUNNING)]
    wrong = [name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise ModelError(
            f"{where}: expected finite weights, got NaN or infinity in {listed(wrong)}"
        )


def listed(names: Sequence[str]) -> str:
    """Return the first few of some names, and how many more there are."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
