"""Adapters in PEFT's format, base models in transformers', and merged models.

Source: PEFT's checkpoint format (adapter_config.json, adapter_model.safetensors with rank_pattern
and alpha_pattern).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.numpy import save_file
from torch import nn
from transformers import AutoTokenizer

from rayfed_lora.errors import BadInputError
from rayfed_lora.models import loading, sources
from rayfed_lora.models.heads import head_modules
from rayfed_lora.models.linear import is_transposed
from rayfed_lora.models.padding import give_padding_token, settle_padding
from rayfed_lora.recipe.model import Adapter, Model
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import AdapterState, Base, Factors, FloatArray, Trainable

PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
# Values of a configuration that no logit depends on.
_NAMING = frozenset({"id2label", "label2id", "problem_type"})


def peft_tensors(state: AdapterState) -> dict[str, FloatArray]:
    """Return the state under the names of a PEFT checkpoint; modules of rank 0 have none."""
    tensors = {f"{PREFIX}{name}": np.ascontiguousarray(t) for name, t in state.dense.items()}
    for name, factors in state.factors.items():
        if factors.rank > 0:
            tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(factors.a)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(factors.b)
    return tensors


def trained_files(
    recipe: Recipe,
    facts: Mapping[str, Any],
    state: AdapterState,
    base: Base,
    trainable: Trainable,
    everything: Mapping[str, FloatArray],
) -> dict[str, bytes]:
    """Return `adapter/...` and, where a user could not get the base elsewhere, `base/...`.

    PEFT has no adapter without modules: where no module is adapted, `base/` is the trained model.

    Args:
        recipe: the run.
        facts: of the model's configuration, as of a `Workload`.
        state: what was trained.
        base: what it is trained on.
        trainable: `full` or `adapter`.
        everything: every parameter of the plain model, without factors, by name.
    """
    changed = base.version > (0, 0) or trainable == "full"
    biases, own_config = recipe.adapter.train_biases, _configured(recipe.model, facts)
    net, drawn = loading.built(recipe.model, sources.restored(facts), recipe.seed)
    # What the run has drawn and the adapter does not hold is nowhere else.
    no_adapter = trainable == "full" or not state.factors
    keep_base = changed or biases or own_config or no_adapter or not drawn <= set(state.dense)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not no_adapter:
            name = "base" if keep_base else sources.location(recipe.model.source)
            write_adapter(folder / "adapter", state, net, recipe.adapter, name)
        if keep_base:
            write_base(folder / "base", net, everything)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _configured(model: Model, facts: Mapping[str, Any]) -> bool:
    """Return whether the run's configuration computes other things than the source's own."""
    if model.config:
        return True
    own = sources.configuration(model, {}).to_dict()
    return any(own.get(name) != value for name, value in facts.items() if name not in _NAMING)


def write_adapter(
    folder: Path, state: AdapterState, net: nn.Module, adapter: Adapter, base_name: str
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    A module of rank 0 is left out; where there is no other, the first gets one direction of zeros,
    since PEFT has no adapter without modules. Dense tensors outside of the head belong to the base.

    Args:
        folder: made if it is missing.
        state: factors and head.
        net: the plain model, for its module names.
        adapter: the recipe's section.
        base_name: where the base model is to be loaded from.
    """
    factors = {name: f for name, f in state.factors.items() if f.rank > 0} or _zeros(state)
    top = max(f.rank for f in factors.values())
    config = LoraConfig(
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=top,
        lora_alpha=adapter.alpha,
        target_modules=sorted(factors),
        rank_pattern={name: f.rank for name, f in factors.items()},
        alpha_pattern={name: f.scale * f.rank for name, f in factors.items()},
        lora_dropout=adapter.dropout,
        fan_in_fan_out=any(is_transposed(net.get_submodule(name)) for name in factors),
        modules_to_save=head_modules(net, adapter) if adapter.train_head else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    heads = tuple(f"{module}." for module in head_modules(net, adapter))
    dense = {name: tensor for name, tensor in state.dense.items() if name.startswith(heads)}
    tensors = peft_tensors(AdapterState(factors, dense))
    save_file(tensors, str(folder / _WEIGHTS), metadata={"format": "pt"})


def _zeros(state: AdapterState) -> Mapping[str, Factors]:
    name, f = next(iter(state.factors.items()))
    d_in, d_out = f.a.shape[1], f.b.shape[0]
    return {name: Factors(np.zeros((1, d_in), np.float32), np.zeros((d_out, 1), np.float32), 1.0)}


def write_base(folder: Path, net: nn.Module, tensors: Mapping[str, FloatArray]) -> None:
    """Write a plain model with the given parameters in transformers' format.

    Args:
        folder: made if it is missing.
        net: a plain transformers model; its parameters are overwritten.
        tensors: every parameter by name.
    """
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.tensor(tensors[name]))
    with sources.quiet():
        net.save_pretrained(str(folder))  # type: ignore[operator]


def merge(
    base_folder: str, adapter_folder: Path | None, model: Model, labels: Sequence[str]
) -> Any:
    """Return the base model with the adapter merged into its weights.

    Args:
        base_folder: folder or hub id of the base.
        adapter_folder: PEFT checkpoint, or None where the base is the trained model itself.
        model: the recipe's section, for the task.
        labels: name of each class.

    Raises:
        BadInputError: the adapter's weights are not safetensors.
    """
    if adapter_folder is not None and not (adapter_folder / _WEIGHTS).is_file():
        # PEFT would look for a pickle.
        raise BadInputError(f"expected {_WEIGHTS} in {adapter_folder.name}/")
    plain = model.model_copy(update={"source": base_folder, "config": {}})
    facts = {} if model.task == "causal-lm" else sources.label_facts(labels)
    config = sources.configuration(plain, facts)
    if model.task == "text-classification":
        tokenizer = sources.tokenizer(model)
        give_padding_token(tokenizer)
        settle_padding(config, sources.skeleton(plain, config), tokenizer, model)
    net = loading.build(plain, config, seed=0, keep_head=True)
    if adapter_folder is None:
        return net
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; nothing a user could do about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(net, str(adapter_folder)).merge_and_unload()


def write_model(folder: Path, net: Any, tokenizer_source: str | None) -> None:
    """Write a whole model, and its tokenizer where there is one, in transformers' format.

    Raises:
        BadInputError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInputError(f"--to: expected a new or empty folder, {folder} has files in it")
    with sources.quiet():
        net.save_pretrained(str(folder))
        if tokenizer_source is not None:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_source, trust_remote_code=False)
            pad = net.config.get_text_config().pad_token_id
            if tokenizer.pad_token is None and pad is not None and pad >= 0:
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
            tokenizer.save_pretrained(str(folder))
