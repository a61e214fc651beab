"""Where a base model comes from: a configuration, an installed package, a folder or a hub id.

Source: this project.
"""

from __future__ import annotations

import difflib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rayfed_lora.errors import ModelError
from rayfed_lora.locations import check_name
from rayfed_lora.models.folders import check_folder
from rayfed_lora.recipe.model import Model

# What transformers takes beside values of a configuration; one of them runs a stranger's code.
_LOADING = frozenset(
    {
        "auto_map",
        "cache_dir",
        "code_revision",
        "custom_pipelines",
        "force_download",
        "local_files_only",
        "name_or_path",
        "pretrained_model_name_or_path",
        "proxies",
        "return_unused_kwargs",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
        "use_auth_token",
    }
)
_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' load reports and bars off the terminal; its errors still raise."""
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def location(source: str) -> str:
    """Return the folder or hub id that transformers loads `source` from.

    `package:<name>` is the folder inside the installed package that holds a config.json (found
    without importing the package); `package:<name>/<folder>` names it.

    Raises:
        ModelError: the package is not installed, or holds no model or several.
    """
    if not source.startswith("package:"):
        return source
    name, _, folder = source.removeprefix("package:").partition("/")
    module = name.replace("-", "_")
    # A dot would import the package that the rest is in.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"model.source {source!r}: no installed Python package {name!r}")
    root = Path(next(iter(spec.submodule_search_locations)))
    if folder:
        try:
            check_name(folder)
        except ValueError as error:
            raise ModelError(f"model.source {source!r}: {error}") from None
        found = [root / folder] if (root / folder / "config.json").is_file() else []
    else:
        found = sorted(p.parent for p in root.rglob("config.json") if _is_model(p.parent))
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(root)) for p in found) or "none"
        raise ModelError(
            f"model.source {source!r}: expected one folder with a model's config.json and"
            f" safetensors in package {name!r}, found {names}; name one as package:{name}/<folder>"
        )
    return str(found[0])


def _is_model(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def configuration(model: Model, overrides: dict[str, Any]) -> Any:
    """Return the transformers configuration of the model.

    Args:
        model: the recipe's section; its `config` wins over the source's own.
        overrides: further values, used where `config` does not name them.

    Raises:
        ModelError: it cannot be read or transformers refuses a value.
    """
    own = {k: v for k, v in model.config.items() if k != "architecture"}
    loading = sorted(own.keys() & _LOADING)
    if loading:
        raise ModelError(
            f"model.config.{loading[0]}: expected values of the model's configuration; how it is"
            " loaded is fixed: safetensors only, and no code that comes with a model"
        )
    try:
        with quiet():
            if model.source == "config":
                found = AutoConfig.for_model(model.config["architecture"], **overrides | own)
            else:
                place = location(model.source)
                check_folder(Path(place), where(model))
                found = AutoConfig.from_pretrained(
                    place, trust_remote_code=False, **overrides | own
                )
    except ModelError:
        raise
    except Exception as error:  # configurations check themselves with errors of many kinds
        raise ModelError(f"{where(model)}: {message(error)}") from error
    _check_keys(list(own), found)
    return found


def _check_keys(keys: list[str], config: Any) -> None:
    """Refuse keys that the configuration's class does not know; transformers would keep them."""
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
    """Return the configuration that `to_dict` of another one gave."""
    rest = dict(values)
    return AutoConfig.for_model(rest.pop("model_type"), **rest)


def label_facts(names: Sequence[str]) -> dict[str, Any]:
    """Return what a configuration says of the classes, from the name of each."""
    labels = dict(enumerate(names))
    return {
        "num_labels": len(labels),
        "id2label": labels,
        "label2id": {name: i for i, name in labels.items()},
    }


def skeleton(model: Model, config: Any) -> nn.Module:
    """Return the model on torch's meta device: names and shapes, no weights.

    Raises:
        ModelError: transformers has no such model for the task.
    """
    try:
        with quiet(), torch.device("meta"):
            net = auto_class(model).from_config(config)
        # Some models make a few tensors where they please.
        return net.to("meta")  # type: ignore[no-any-return]
    except Exception as error:  # a model takes its configuration at its word, and fails anyhow
        raise ModelError(f"{where(model)}: {message(error)}") from error


def drawn(model: Model, config: Any) -> nn.Module:
    """Return the model in float32 with weights drawn at random, whatever its source has."""
    with quiet():
        return auto_class(model).from_config(config).float()  # type: ignore[no-any-return]


def load_code(model: Model) -> None:
    """Import the module of the model's class: transformers does it when one is first made.

    A model that cannot be made is left to who prepares the run, with the facts of its data.
    """
    with suppress(ModelError):
        skeleton(model, configuration(model, {}))


def weights(net: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return a model's parameters and buffers by name, as arrays that share its memory."""
    tensors = [*net.named_parameters(remove_duplicate=False)]
    tensors += [*net.named_buffers(remove_duplicate=False)]  # type: ignore[list-item]
    # One array for each tensor: tied weights stay tied where the arrays travel, too.
    arrays = {id(tensor): tensor.detach().numpy() for _, tensor in tensors}
    return {name: arrays[id(tensor)] for name, tensor in tensors}


def assembled(
    model: Model, config: Any, arrays: Mapping[str, npt.NDArray[Any]]
) -> nn.Module | None:
    """Return the model around the given weights, without copying them.

    Args:
        model: the recipe's section.
        config: from `configuration`.
        arrays: from `weights` of the same model; may be read-only, and are then never to be
            written to.

    Returns:
        The model, or None where it holds tensors that are neither parameters nor buffers.
    """
    net = skeleton(model, config)
    # One parameter for each array: tied weights stay tied.
    shared: dict[int, nn.Parameter] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        for key, parameter in module._parameters.items():
            if parameter is not None:
                array = arrays[prefix + key]
                place = array.__array_interface__["data"][0]
                held = nn.Parameter(_view(array), requires_grad=False)
                module._parameters[key] = shared.setdefault(place, held)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                # Small, and some models write to them.
                module._buffers[key] = torch.tensor(arrays[prefix + key])
        if any(isinstance(v, torch.Tensor) and v.is_meta for v in vars(module).values()):
            return None
    return net


def _view(array: npt.NDArray[Any]) -> torch.Tensor:
    with warnings.catch_warnings():
        # torch warns of every read-only array, since it could not stop a write to it.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def tokenizer(model: Model) -> Any:
    """Return the tokenizer of the model.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    source = model.tokenizer or model.source
    if source == "config":
        raise ModelError(
            "model.tokenizer: expected a package, folder or hub id, since model.source 'config'"
            " has no tokenizer of its own"
        )
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(location(source), trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # tokenizers are read by code of many kinds
        raise ModelError(f"tokenizer of {source!r}: {_first_line(error)}") from error


def auto_class(model: Model) -> Any:
    """Return transformers' class that makes models for the task."""
    return getattr(transformers, _CLASSES[model.task])


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def where(model: Model) -> str:
    """Return the recipe's key that a model comes from, for messages."""
    return "model.config" if model.source == "config" else f"model.source {model.source!r}"


def message(error: BaseException) -> str:
    """Return an error of a library in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
