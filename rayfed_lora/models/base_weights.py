"""A model's weights: loaded with a report, drawn, or shared as arrays. Source: this project."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.labels import match_head
from rayfed_lora.models.precision import compute_in_float32, shorten
from rayfed_lora.models.wording import listed, where
from rayfed_lora.recipe.model import Model
from rayfed_lora.seeds import Purpose, torch_seed

_RUNNING = ("running_mean", "running_var")


@dataclass(frozen=True)
class LoadReport:
    """What transformers reports about a source's weights; names are the model's own.

    Missing are tensors of the model that the source lacks, except tied ones; `mismatched` has the
    shapes in the source and in the model.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]


def load_report(model: Model, config: Any, *, local_only: bool = False) -> LoadReport | None:
    """Return how the source's weights fit, from their names and shapes; no weight is read.

    None for the source `config`, and, if `local_only`, for weights that are not on this machine.

    Raises:
        ModelError: the weights cannot be read.
    """
    if model.source == "config":
        return None
    offline = local_only and not Path(base_models.location(model.source)).is_dir()
    # A copy, since loading changes the configuration.
    own = copy.deepcopy(config)
    try:
        return _load(model, own, device_map="meta", local_files_only=offline)[1]
    except ModelError as error:
        if offline and isinstance(error.__cause__, OSError):
            return None
        raise


def _load(model: Model, config: Any, **options: Any) -> tuple[nn.Module, LoadReport]:
    with base_models.attributed(where(model)):
        net, info = base_models.auto_class(model).from_pretrained(
            base_models.location(model.source),
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **{"dtype": torch.float32, **options},
        )
    if info["error_msgs"]:
        raise ModelError(f"{where(model)}: {' '.join(info['error_msgs'])}")
    shapes = {name: (tuple(had), tuple(needed)) for name, had, needed in info["mismatched_keys"]}
    missing, unexpected = (sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    return net, LoadReport(tuple(missing), tuple(unexpected), dict(sorted(shapes.items())))


def source_dtype(model: Model) -> torch.dtype:
    """Return the precision that a source's weights are stored in; no weight is read.

    Raises:
        ModelError: the source cannot be read.
    """
    if model.source == "config":
        return torch.float32
    config = base_models.configuration(model, {})
    return _load(model, config, device_map="meta", dtype="auto")[0].dtype  # type: ignore[return-value]


def kept_dtype(model: Model, *, on_gpu: bool) -> torch.dtype:
    """Return the type that `model.dtype` keeps the large frozen weights in.

    Raises:
        ModelError: it is the source's, which cannot be read.
    """
    if model.dtype != "auto":
        return torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    stored = source_dtype(model) if on_gpu else torch.float32
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


def build_kept(
    model: Model, config: Any, seed: int, dtype: torch.dtype, trained: Collection[str]
) -> tuple[nn.Module, frozenset[str]]:
    """Return the model with its large weights in a type, all else in float32.

    And the names of its random tensors, as `build_and_list_random` does.

    Weights that the source has in 16 bits are not read as float32 on the way.

    Args:
        model: the section of the recipe.
        config: of the model.
        seed: of the run.
        dtype: from `kept_dtype`.
        trained: names of parameters that stay float32.

    Raises:
        ModelError: as of `build_and_list_random`.
    """
    if dtype == torch.float32:
        return build_and_list_random(model, config, seed)
    net, random = build_and_list_random(model, config, seed, as_stored=True)
    shorten(net, dtype, trained)
    return net, random


def build(model: Model, config: Any, seed: int, *, keep_head: bool = False) -> nn.Module:
    """Return the model of `build_and_list_random` alone."""
    return build_and_list_random(model, config, seed, keep_head=keep_head)[0]


def build_and_list_random(
    model: Model, config: Any, seed: int, *, keep_head: bool = False, as_stored: bool = False
) -> tuple[nn.Module, frozenset[str]]:
    """Return the model in float32, and the names of its randomly initialised tensors.

    `as_stored`: in the types that the source has them in. All random weights follow from the run's
    seed. The tensors of a head whose classes have other names than those of `config` are
    initialised again, unless `keep_head`.

    Raises:
        ModelError: the weights cannot be read, or are not finite.
    """
    torch.manual_seed(torch_seed(seed, Purpose.MODEL_INIT))
    if model.source == "config":
        net = base_models.randomly_initialised(model, config)
        return net, frozenset(name for name, _ in net.named_parameters())
    net, report = _load(model, config, **({"dtype": "auto"} if as_stored else {}))
    random = {*report.missing, *report.mismatched}
    if model.task != "causal-lm" and not keep_head:
        labels = [config.id2label[i] for i in range(config.num_labels)]
        if match_head(model, labels).kind == "other":
            random |= _reinitialise_head(net, model, config, seed)
    _check_finite(net, where(model))
    return net if as_stored else net.float(), frozenset(random)


def class_tensors(model: Model, config: Any) -> frozenset[str]:
    """Return the names of the parameters whose size depends on the number of classes."""
    larger = copy.deepcopy(config)
    larger.num_labels = config.num_labels + 1
    shapes = {name: p.shape for name, p in base_models.skeleton(model, config).named_parameters()}
    others = base_models.skeleton(model, larger).named_parameters()
    return frozenset(name for name, p in others if p.shape != shapes[name])


def _reinitialise_head(net: nn.Module, model: Model, config: Any, seed: int) -> frozenset[str]:
    """Replace the tensors trained for other classes by random weights; return their names."""
    names = class_tensors(model, config)
    torch.manual_seed(torch_seed(seed, Purpose.MODEL_INIT))
    with torch.no_grad():
        random = base_models.randomly_initialised(model, config)
        for name in names:
            net.get_parameter(name).copy_(random.get_parameter(name))
    return names


def _check_finite(net: nn.Module, source: str) -> None:
    tensors: dict[str, torch.Tensor] = dict(net.named_parameters())
    tensors |= {n: buffer for n, buffer in net.named_buffers() if n.endswith(_RUNNING)}
    wrong = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise ModelError(
            f"{source}: expected finite weights, got NaN or infinity in {listed(wrong)}"
        )


def arrays_of(net: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return a model's parameters and buffers by name, as arrays that share their memory.

    numpy has no bfloat16: its bits are uint16, a type that weights do not have otherwise.
    """
    tensors = [*net.named_parameters(remove_duplicate=False)]
    tensors += [*net.named_buffers(remove_duplicate=False)]  # type: ignore[list-item]
    # One array per tensor, so that tied weights are still tied after pickling.
    arrays = {id(tensor): _array(tensor.detach()) for _, tensor in tensors}
    return {name: arrays[id(tensor)] for name, tensor in tensors}


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    array: npt.NDArray[Any] = bits.numpy()
    return array


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def assembled(
    model: Model, config: Any, arrays: Mapping[str, npt.NDArray[Any]]
) -> nn.Module | None:
    """Return the model on arrays from `arrays_of`; None where it has tensors of another kind.

    Parameters are not copied. The arrays may be read-only: never write to the parameters.
    """
    net = base_models.skeleton(model, config)
    # One parameter per address, so that tied weights are tied.
    shared: dict[int, nn.Parameter] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                array = arrays[prefix + key]
                address = array.__array_interface__["data"][0]
                with warnings.catch_warnings():
                    # torch warns about read-only arrays, since it cannot prevent writes.
                    warnings.simplefilter("ignore", UserWarning)
                    view = nn.Parameter(_tensor(array), requires_grad=False)
                module._parameters[key] = shared.setdefault(address, view)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                # Copied, since some models write to their buffers.
                module._buffers[key] = torch.tensor(arrays[prefix + key])
        if any(isinstance(v, torch.Tensor) and v.is_meta for v in vars(module).values()):
            return None
    compute_in_float32(net)
    return net
