"""Adapters in PEFT's format, base models in transformers' format, and merged models.

Source: PEFT's checkpoint format, with rank_pattern and alpha_pattern.
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
from rayfed_lora.lora.resize import pad
from rayfed_lora.models import base_models, base_weights
from rayfed_lora.models.heads import head_modules
from rayfed_lora.models.linear import is_transposed
from rayfed_lora.models.tokenizer import give_padding_token, read_tokenizer, settle_padding
from rayfed_lora.recipe.model import Adapter, Model
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import AdapterState, Base, Factors, FloatArray, Trainable

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
# Entries of a configuration that do not affect logits.
_NAMING = frozenset({"id2label", "label2id", "problem_type"})


def trained_files(
    recipe: Recipe,
    facts: Mapping[str, Any],
    state: AdapterState,
    base: Base,
    trainable: Trainable,
    everything: Mapping[str, FloatArray],
) -> dict[str, bytes]:
    """Return the files `adapter/...` and, where the source does not provide the base, `base/...`.

    A PEFT adapter needs modules: where none are adapted, `base/` alone is the trained model.
    `facts` are the model's configuration, as in a `Workload`, and `everything` has every parameter
    of the plain model, without factors, by name.
    """
    no_adapter = trainable == "full" or not state.factors
    config = base_models.restored(facts)
    net, random = base_weights.build_and_list_random(recipe.model, config, recipe.seed)
    keep_base = (
        no_adapter
        or base.version > (0, 0)
        or recipe.adapter.train_biases
        or _is_configured(recipe.model, facts)
        # Random tensors outside of the adapter exist nowhere else.
        or not random <= set(state.dense)
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if not no_adapter:
            name = "base" if keep_base else base_models.location(recipe.model.source)
            write_adapter(folder / "adapter", state, net, recipe.adapter, name)
        if keep_base:
            with torch.no_grad(), base_models.quiet():
                for name, parameter in net.named_parameters():
                    parameter.copy_(torch.tensor(everything[name]))
                net.save_pretrained(str(folder / "base"))  # type: ignore[operator]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _is_configured(model: Model, facts: Mapping[str, Any]) -> bool:
    """Return whether the run's configuration may give other logits than the source's own."""
    if model.config:
        return True
    own = base_models.configuration(model, {}).to_dict()
    return any(own.get(name) != value for name, value in facts.items() if name not in _NAMING)


def write_adapter(
    folder: Path, state: AdapterState, net: nn.Module, adapter: Adapter, base_name: str
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    A module of rank 0 is left out; if all have rank 0, the first gets rank 1 with zeros, since a
    PEFT adapter needs modules. Dense tensors outside of the head belong to the base.

    `net` is the plain model, for its module names; `base_name` a folder or hub id.
    """
    factors = {name: f for name, f in state.factors.items() if f.rank > 0}
    if not factors:
        name, f = next(iter(state.factors.items()))
        factors = {name: pad(Factors(f.a, f.b, 1.0), 1)}
    heads = head_modules(net, adapter)
    config = LoraConfig(
        base_model_name_or_path=base_name,
        inference_mode=True,
        r=max(f.rank for f in factors.values()),
        lora_alpha=adapter.alpha,
        target_modules=sorted(factors),
        rank_pattern={name: f.rank for name, f in factors.items()},
        alpha_pattern={name: f.scale * f.rank for name, f in factors.items()},
        lora_dropout=adapter.dropout,
        fan_in_fan_out=any(is_transposed(net.get_submodule(name)) for name in factors),
        modules_to_save=heads if adapter.train_head else None,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    inside = tuple(f"{module}." for module in heads)
    tensors = {name: tensor for name, tensor in state.dense.items() if name.startswith(inside)}
    for name, f in factors.items():
        tensors |= {f"{name}.lora_A.weight": f.a, f"{name}.lora_B.weight": f.b}
    named = {f"{_PREFIX}{name}": np.ascontiguousarray(t) for name, t in tensors.items()}
    save_file(named, str(folder / _WEIGHTS), metadata={"format": "pt"})


def merge(
    base_folder: str, adapter_folder: Path | None, model: Model, labels: Sequence[str]
) -> Any:
    """Return the base model, from a folder or hub id, with the adapter merged into its weights.

    Without an adapter, the base is the trained model itself.

    Raises:
        BadInputError: the adapter's weights are not safetensors.
    """
    if adapter_folder is not None and not (adapter_folder / _WEIGHTS).is_file():
        # PEFT would load a pickle instead.
        raise BadInputError(f"expected {_WEIGHTS} in {adapter_folder.name}/")
    plain = model.model_copy(update={"source": base_folder, "config": {}})
    facts = {} if model.task == "causal-lm" else base_models.label_facts(labels)
    config = base_models.configuration(plain, facts)
    if model.task == "text-classification":
        tokenizer = read_tokenizer(model)
        give_padding_token(tokenizer)
        settle_padding(config, base_models.skeleton(plain, config), tokenizer, model)
    net = base_weights.build(plain, config, seed=0, keep_head=True)
    if adapter_folder is None:
        return net
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed; the user cannot change that.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(net, str(adapter_folder)).merge_and_unload()


def write_model(folder: Path, net: Any, tokenizer_source: str | None) -> None:
    """Write a whole model, and the tokenizer in a folder or hub id, in transformers' format.

    Raises:
        BadInputError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInputError(f"--to: expected a new or empty folder, {folder} has files in it")
    with base_models.quiet():
        net.save_pretrained(str(folder))
        if tokenizer_source is not None:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_source, trust_remote_code=False)
            pad = net.config.get_text_config().pad_token_id
            if tokenizer.pad_token is None and pad is not None and pad >= 0:
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
            tokenizer.save_pretrained(str(folder))
