"""A PEFT adapter that a run starts from (`model.adapter`).

PEFT reads it, onto a model without weights: ranks, patterns and scales are PEFT's own. Source: this
project.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from rayfed_lora.errors import ModelError
from rayfed_lora.models import base_models
from rayfed_lora.models.wording import listed
from rayfed_lora.recipe.model import Model
from rayfed_lora.types import AdapterState, Factors, FloatArray, ModelShape

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Features of PEFT that change more than the product of two factors; value where they are off.
_PLAIN = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    # The others change the base, too.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


def adapter_folder(model: Model) -> Path:
    """Return the folder of the adapter that is named: itself, or that of a run.

    Raises:
        ModelError: there is none.
    """
    named = Path(str(model.adapter)).expanduser()
    for folder in (named, named / "adapter"):
        if (folder / _CONFIG).is_file():
            if not (folder / _WEIGHTS).is_file():
                raise ModelError(f"model.adapter {model.adapter!r}: expected {_WEIGHTS} beside it")
            return folder
    raise ModelError(
        f"model.adapter {model.adapter!r}: expected a folder with a PEFT adapter ({_CONFIG}), or of"
        f" a run that has one in adapter/; {'there is none' if named.is_dir() else 'no folder'}"
    )


def read_start(model: Model, config: Any, shape: ModelShape) -> AdapterState:
    """Return factors and head of the adapter that a run starts from.

    Modules without factors in the adapter have rank 0; `dense` has the head, if the adapter has it.

    Args:
        model: with `adapter`.
        config: transformers' configuration of the model.
        shape: the modules that the run adapts, and its head.

    Raises:
        ModelError: the adapter cannot be read, or does not fit what the run trains.
    """
    folder = adapter_folder(model)
    subject = f"model.adapter {model.adapter!r}"
    settings = _settings(folder, subject)
    net = base_models.skeleton(model, config)
    with base_models.attributed(subject), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(net, settings, low_cpu_mem_usage=True)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        tensors = load_peft_weights(str(folder), device="cpu")
    for these, those, what in ((expected, tensors, "lacks"), (tensors, expected, "also has")):
        if differ := [name.removeprefix(_PREFIX) for name in these if name not in those]:
            raise ModelError(
                f"{subject}: expected the tensors of the modules in its {_CONFIG}, {_WEIGHTS}"
                f" {what} {listed(differ)}"
            )
    for name, like in expected.items():
        if tensors[name].shape != like.shape:
            raise ModelError(
                f"{subject}: {name.removeprefix(_PREFIX)}: expected shape {tuple(like.shape)}, as"
                f" its {_CONFIG} and the model have it, got {tuple(tensors[name].shape)}"
            )
    values = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    inner = adapted.base_model.model
    factors = dict(_factors(inner, values, shape, subject))
    if not any(f.rank for f in factors.values()):
        raise ModelError(f"{subject}: expected factors of some modules, it has none")
    ordered = {name: factors.get(name) or _empty(shape, name) for name in shape.modules}
    return AdapterState(ordered, dict(_head(inner, values, shape, subject)))


def start_note(model: Model, start: AdapterState, rank: int) -> list[str]:
    """Return notes on an adapter that a run starts from; `rank`: of the first round."""
    notes = []
    largest = max(f.rank for f in start.factors.values())
    if largest > rank:
        notes.append(
            f"model.adapter has rank {largest}, the first round has rank {rank}: it starts from the"
            " nearest adapter of that rank"
        )
    trained_on = PeftConfig.from_pretrained(str(adapter_folder(model))).base_model_name_or_path
    here = base_models.location(model.source)
    if trained_on and _place(trained_on) != _place(here):
        notes.append(f"model.adapter was trained on {trained_on}, model.source is {model.source}")
    return notes


def _place(source: str) -> str:
    return os.path.realpath(source) if Path(source).is_dir() else source


def _settings(folder: Path, subject: str) -> LoraConfig:
    """Return PEFT's configuration, or raise ModelError where it is not plain LoRA."""
    with base_models.attributed(subject):
        found = PeftConfig.from_pretrained(str(folder))
    if not isinstance(found, LoraConfig):
        kind = getattr(found.peft_type, "value", found.peft_type)
        raise ModelError(f"{subject}: expected a LoRA adapter, got {kind}")
    for name, plain in _PLAIN.items():
        value = getattr(found, name, plain[0])
        if value not in plain:
            raise ModelError(
                f"{subject}: expected plain LoRA, {name} {plain[0]!r} in its {_CONFIG}, got"
                f" {value!r}"
            )
    found.inference_mode = False
    return found


def _factors(
    net: nn.Module, tensors: Mapping[str, torch.Tensor], shape: ModelShape, subject: str
) -> Iterator[tuple[str, Factors]]:
    """Yield the factors of each adapted module."""
    for name, module in net.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if name not in shape.modules:
            raise ModelError(
                f"{subject}: expected factors of the modules that the run adapts"
                f" (adapter.target_modules: {listed([*shape.modules])}), it has some of {name}"
            )
        a, b = (_finite(f"{name}.lora_{side}.weight", tensors, subject) for side in ("A", "B"))
        yield name, Factors(a, b, float(next(iter(module.scaling.values()))))


def _head(
    net: nn.Module, tensors: Mapping[str, torch.Tensor], shape: ModelShape, subject: str
) -> Iterator[tuple[str, FloatArray]]:
    """Yield the tensors beside the factors; all have to be of the head."""
    for name, module in net.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        saved = next(iter(module.modules_to_save.values()))
        for key, _ in saved.named_parameters():
            full = f"{name}.{key}"
            if full not in shape.head:
                raise ModelError(
                    f"{subject}: it has trained values of {full}, which the run does not train"
                    f" ({listed(shape.head) or 'no head'}); see adapter.train_head and"
                    " adapter.head_modules, or merge the adapter into its base"
                )
            yield full, _finite(full, tensors, subject)


def _finite(name: str, tensors: Mapping[str, torch.Tensor], subject: str) -> FloatArray:
    values: FloatArray = tensors[name].to(torch.float32).numpy().copy()
    if not np.isfinite(values).all():
        raise ModelError(f"{subject}: expected finite numbers, {name} has others")
    return values


def _empty(shape: ModelShape, name: str) -> Factors:
    own = shape.modules[name]
    return Factors(np.zeros((0, own.d_in), np.float32), np.zeros((own.d_out, 0), np.float32), 1.0)
