"""Adapters in PEFT's format, base models in transformers' format, and merged models.

Each has the tokenizer or image processor beside it. Source: PEFT's checkpoint format.
"""

from __future__ import annotations

import copy
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.numpy import save_file
from torch import nn

from rayfed_lora.data.workload import Workload
from rayfed_lora.errors import BadInputError
from rayfed_lora.lora.resize import pad
from rayfed_lora.models import base_models, base_weights
from rayfed_lora.models.heads import head_modules
from rayfed_lora.models.image_processor import write_image_processor
from rayfed_lora.models.linear import is_transposed
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.tokenizer import (
    give_padding_token,
    read_tokenizer,
    settle_padding,
    write_tokenizer,
)
from rayfed_lora.recipe.model import Adapter, Model
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.types import AdapterState, Factors, FloatArray, GlobalModel

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
# PEFT's task types; it has none for images.
_TASK_TYPES = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
# Entries of a configuration that do not affect logits.
_NAMING = frozenset({"id2label", "label2id", "problem_type"})
# What the names of a model's own files begin with; tokenizers and image processors have others.
_MODEL_FILES = ("adapter_", "config.json", "generation_config.json", "model", "README.md")


def trained_files(
    recipe: Recipe,
    workload: Workload,
    model: GlobalModel,
    net: nn.Module,
    random: Collection[str],
    everything: Mapping[str, FloatArray],
) -> dict[str, bytes]:
    """Return the files `adapter/...` and, where the source does not provide the base, `base/...`.

    A PEFT adapter needs modules: where none are adapted, `base/` alone is the trained model.

    Args:
        recipe: the run.
        workload: its data.
        model: what is written.
        net: the plain model as its source has it; its parameters are replaced, not written to.
        random: names of its tensors that are not the source's.
        everything: every parameter of the plain model, without factors, by name.
    """
    state, base = model.state, model.base
    no_adapter = model.trainable == "full" or not state.factors
    config = net.config
    keep_base = (
        no_adapter
        or base.version > (0, 0)
        or recipe.adapter.train_biases
        or _is_configured(recipe.model, workload.config)
        # Random tensors outside of the adapter exist nowhere else.
        or not set(random) <= set(state.dense)
    )
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if keep_base:
            _replace(net, everything)
            with quiet():
                net.save_pretrained(str(folder / "base"))  # type: ignore[operator]
        if not no_adapter:
            source = "base" if keep_base else base_models.location(recipe.model.source)
            write_adapter(folder / "adapter", state, net, recipe, source)
        for part in folder.iterdir():
            if recipe.model.task == "image-classification":
                write_image_processor(part, recipe.model, config, workload.float_pixels)
            else:
                write_tokenizer(part, recipe.model, workload.chat_template)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _is_configured(model: Model, facts: Mapping[str, Any]) -> bool:
    """Return whether the run's configuration may give other logits than the source's own."""
    if model.config:
        return True
    own = base_models.configuration(model, {}).to_dict()
    return any(own.get(name) != value for name, value in facts.items() if name not in _NAMING)


def write_adapter(
    folder: Path, state: AdapterState, net: nn.Module, recipe: Recipe, base: str
) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    A module of rank 0 is left out; if all have rank 0, the first gets rank 1 with zeros, since a
    PEFT adapter needs modules. Dense tensors outside of the head belong to the base. Ranks and
    scales are written by module only where they differ: some readers know one of each.

    Args:
        folder: where to.
        state: what was trained.
        net: the plain model; its head gets the trained values, and PEFT's layers are put into it.
        recipe: the run.
        base: a hub id, or a folder, which is written as an absolute path if it exists.
    """
    factors = {name: f for name, f in state.factors.items() if f.rank > 0}
    if not factors:
        name, f = next(iter(state.factors.items()))
        factors = {name: pad(Factors(f.a, f.b, 1.0), 1)}
    config = _lora_config(factors, net, recipe.adapter, recipe.model.task)
    _replace(net, state.dense)
    # PEFT itself says which tensors a file must have: also the buffers of a head, and modules that
    # it counts as one by their names. A copy, since it changes the configuration.
    with _no_peft_warnings():
        adapted = get_peft_model(net, copy.deepcopy(config), low_cpu_mem_usage=True)
        tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    arrays = {f"{_PREFIX}{name}.lora_A.weight": f.a for name, f in factors.items()}
    arrays |= {f"{_PREFIX}{name}.lora_B.weight": f.b for name, f in factors.items()}
    arrays |= {name: t.numpy() for name, t in tensors.items() if name not in arrays}
    folder.mkdir(parents=True, exist_ok=True)
    config.base_model_name_or_path = os.path.abspath(base) if Path(base).is_dir() else base
    config.save_pretrained(str(folder))
    copies = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    save_file(copies, str(folder / _WEIGHTS), metadata={"format": "pt"})


def _replace(net: nn.Module, values: Mapping[str, FloatArray]) -> None:
    """Give parameters other values; the memory of their former ones, which others may use, stays.

    Tied parameters have one name in `values`, and stay tied.
    """
    for name, parameter in net.named_parameters():
        if name in values:
            parameter.data = torch.tensor(values[name])


def _lora_config(
    factors: Mapping[str, Factors], net: nn.Module, adapter: Adapter, task: str
) -> LoraConfig:
    ranks = {name: f.rank for name, f in factors.items()}
    alphas = {name: _plain(f.scale * f.rank) for name, f in factors.items()}
    largest = max(factors, key=lambda name: factors[name].rank)
    own = {"base_model_class": type(net).__name__, "parent_library": type(net).__module__}
    return LoraConfig(
        task_type=_TASK_TYPES.get(task),
        auto_mapping=None if task in _TASK_TYPES else own,
        inference_mode=True,
        r=ranks[largest],
        lora_alpha=alphas[largest],
        target_modules=sorted(factors),
        rank_pattern=ranks if len({*ranks.values()}) > 1 else {},
        alpha_pattern=alphas if len({*alphas.values()}) > 1 else {},
        lora_dropout=adapter.dropout,
        fan_in_fan_out=any(is_transposed(net.get_submodule(name)) for name in factors),
        modules_to_save=head_modules(net, adapter) if adapter.train_head else None,
    )


def _plain(value: float) -> float:
    """Return a whole number as an integer, as PEFT types an alpha."""
    return int(value) if value == int(value) else value


@contextmanager
def _no_peft_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT reads a property that transformers has renamed, and reports that it has set
        # fan_in_fan_out by the kind of a layer; the user cannot change either.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out", UserWarning)
        yield


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
    with _no_peft_warnings(), base_models.attributed(f"{adapter_folder.name}/"):
        return PeftModel.from_pretrained(net, str(adapter_folder)).merge_and_unload()


def write_model(folder: Path, net: Any, model: Model, dtype: Any, beside: Path | None) -> None:
    """Write a whole model in transformers' format.

    Args:
        folder: where to.
        net: the model.
        model: its section of the recipe.
        dtype: torch dtype of the written weights; None: as in `net`.
        beside: a folder whose tokenizer or image processor is copied; None: the source's tokenizer.

    Raises:
        BadInputError: the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise BadInputError(f"--to: expected a new or empty folder, {folder} has files in it")
    with quiet():
        (net if dtype is None else net.to(dtype)).save_pretrained(str(folder))
    if beside is not None:
        for file in beside.iterdir():
            if not file.name.startswith(_MODEL_FILES):
                shutil.copy(file, folder)
    elif model.task != "image-classification":
        write_tokenizer(folder, model)
