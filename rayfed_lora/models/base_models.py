"""Base models from a configuration, a package, a folder or a hub id. Source: this project."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import (
    StrictDataclassClassValidationError,
    StrictDataclassFieldValidationError,
)
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from rayfed_lora.errors import ModelError
from rayfed_lora.locations import check_name
from rayfed_lora.models.gguf_files import SUFFIX, converted
from rayfed_lora.models.limits import check_numbers, few_modules
from rayfed_lora.models.own import register_all
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.wording import one_line, where
from rayfed_lora.recipe.model import AUTO_CLASSES, Model

# Arguments of transformers' loaders that are no values of a configuration; some run foreign code.
_LOADER_ARGUMENTS = frozenset(
    "auto_map cache_dir code_revision custom_pipelines force_download local_files_only name_or_path"
    " pretrained_model_name_or_path proxies return_unused_kwargs revision subfolder token"
    " trust_remote_code use_auth_token".split()
)
# The rest of the package reads logits by name, and nothing else of an output.
_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


@contextmanager
def attributed(subject: str) -> Iterator[None]:
    """Run transformers quietly; turn any exception into a ModelError that begins with `subject`."""
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except StrictDataclassFieldValidationError as error:
        field = str(error).partition("'")[2].partition("'")[0]
        joint = "." if subject == "model.config" else ", "
        reason = one_line(error.__cause__ or error)
        raise ModelError(f"{subject}{joint}{field}: {reason}") from error
    except StrictDataclassClassValidationError as error:
        raise ModelError(f"{subject}: {one_line(error.__cause__ or error)}") from error
    except Exception as error:  # of many types, for unsuitable files and values
        raise ModelError(f"{subject}: {one_line(error)}") from error


def location(source: str) -> str:
    """Return the folder or hub id that transformers loads a source from.

    `package:<name>` is the only model folder (config.json and safetensors) inside an installed
    package, found without importing the package; `package:<name>/<folder>` names the folder. A
    GGUF file, on its own or in a package, is read into a folder once.

    Raises:
        ModelError: the package is not installed, or contains no model or several, or a GGUF file
            cannot be read.
    """
    if not source.startswith("package:"):
        if source.endswith(SUFFIX) and Path(source).expanduser().is_file():
            return converted(Path(source).expanduser(), f"model.source {source!r}")
        return source
    name, _, folder = source.removeprefix("package:").partition("/")
    module = name.replace("-", "_")
    # find_spec would import the parent of a dotted name.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.source {source!r}: no installed Python package {name!r}")
    root = Path(next(iter(spec.submodule_search_locations)))
    if folder:
        try:
            check_name(folder)
        except ValueError as error:
            raise ModelError(f"model.source {source!r}: {error}") from None
        if folder.endswith(SUFFIX) and (root / folder).is_file():
            return converted(root / folder, f"model.source {source!r}")
        found = [root / folder] if (root / folder / "config.json").is_file() else []
    else:
        configured = (path.parent for path in root.rglob("config.json"))
        found = sorted(each for each in configured if any(each.glob("*.safetensors")))
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(root)) for p in found) or "none"
        raise ModelError(
            f"model.source {source!r}: expected one folder with a model's config.json and"
            f" safetensors in package {name!r}, found {names}; name one as package:{name}/<folder>"
        )
    return str(found[0])


def configuration(model: Model, overrides: dict[str, Any]) -> Any:
    """Return the transformers configuration of the model.

    The recipe's values take precedence over `overrides`, and these over the source's own.

    Raises:
        ModelError: the configuration cannot be read, a key is unknown, or transformers rejects a
            value.
    """
    # A copy: transformers changes nested values.
    register_all()
    own = copy.deepcopy({k: v for k, v in model.config.items() if k != "architecture"})
    arguments = sorted(own.keys() & _LOADER_ARGUMENTS)
    if arguments:
        raise ModelError(
            f"model.config.{arguments[0]}: expected values of the model's configuration; how a"
            " model is loaded is fixed: safetensors only, and no code that comes with a model"
        )
    if "model_type" in own:
        raise ModelError("model.config.model_type: expected the key architecture instead")
    for name, value in _OUTPUTS.items():
        if own.get(name, value) is not value:
            raise ModelError(
                f"model.config.{name}: expected {str(value).lower()}, since only the logits of a"
                f" model are read, got {own[name]!r}"
            )
    check_numbers(own, "model.config")
    values = _OUTPUTS | overrides | own
    with attributed(where(model)):
        if model.source == "config":
            _check_architecture(model.config["architecture"])
            config = AutoConfig.for_model(model.config["architecture"], **values)
        else:
            place = location(model.source)
            _check_folder(Path(place), where(model))
            written, _ = PreTrainedConfig.get_config_dict(place, trust_remote_code=False)
            check_numbers(written, where(model))
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, **values)
    _check_keys(list(own), config)
    if config.architectures is None:
        # transformers iterates over it where a type has several models (DeiT, LeViT).
        config.architectures = []
    return config


def _check_architecture(name: str) -> None:
    if name not in CONFIG_MAPPING:
        close = difflib.get_close_matches(name.lower(), CONFIG_MAPPING.keys(), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ModelError(
            "model.config.architecture: expected a model type of transformers, such as vit, bert"
            f" or llama, got {name!r}{hint}"
        )


def _check_folder(folder: Path, subject: str) -> None:
    """Reject a folder that holds a PEFT adapter, or a model without safetensors.

    A path that is no folder, or has no config.json, passes: transformers reports these itself.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{subject}: expected a whole model, the folder holds a PEFT adapter"
            " (adapter_config.json); merge it into its base first (PeftModel.merge_and_unload,"
            " then save_pretrained), or name the base"
        )
    if any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        return
    other = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS)
    raise ModelError(
        f"{subject}: expected weights as *.safetensors, found {', '.join(other[:3]) or 'none'};"
        " other formats are not read, since they can run code: load the model with transformers"
        " where you trust it, and write it with save_pretrained"
    )


def _check_keys(keys: list[str], config: Any) -> None:
    """Reject keys that the configuration's class does not have; transformers would keep them."""
    known = sorted({*type(config)().to_dict(), *config.attribute_map, "num_labels"})
    unknown = [key for key in keys if key not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ModelError(
            f"model.config.{unknown[0]}: expected a key of {type(config).__name__}{hint}; it has"
            f" {', '.join(known)}"
        )


def restored(values: Mapping[str, Any]) -> Any:
    """Return the configuration whose `to_dict` gave `values`."""
    register_all()
    rest = dict(values)
    return AutoConfig.for_model(rest.pop("model_type"), **rest)


def label_facts(names: Sequence[str]) -> dict[str, Any]:
    """Return a configuration's entries about the classes, given the name of each class."""
    numbers = {name: i for i, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}


def skeleton(model: Model, config: Any) -> nn.Module:
    """Return the model on torch's meta device: names and shapes, no weights.

    Raises:
        ModelError: transformers has no such model for the task.
    """
    if type(config) not in auto_class(model)._model_mapping:
        raise ModelError(
            f"{where(model)}: transformers has no model of type {config.model_type!r} for"
            f" model.task {model.task!r} ({AUTO_CLASSES[model.task]})"
        )
    with attributed(where(model)):
        with torch.device("meta"), few_modules(where(model)), warnings.catch_warnings():
            # `check_size` rejects them.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            net = auto_class(model).from_config(config)
        # Some models ignore torch's default device for a few tensors.
        return net.to("meta")  # type: ignore[no-any-return]


def randomly_initialised(model: Model, config: Any) -> nn.Module:
    """Return the model in float32 with random weights, ignoring those of its source."""
    with attributed(where(model)):
        return auto_class(model).from_config(config).float()  # type: ignore[no-any-return]


def load_code(model: Model) -> None:
    """Import the module of the model's class, which transformers imports lazily."""
    with suppress(ModelError, KeyError):  # reported when the workload is prepared
        auto_class(model)._model_mapping[type(configuration(model, {}))]


def auto_class(model: Model) -> Any:
    """Return transformers' auto class for the model's task."""
    return getattr(transformers, AUTO_CLASSES[model.task])
