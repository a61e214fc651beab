"""Checks of a local model folder, made before transformers reads it. Source: this project."""

from __future__ import annotations

from pathlib import Path

from rayfed_lora.errors import ModelError

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")


def check_folder(folder: Path, where: str) -> None:
    """Reject a folder that holds a PEFT adapter, or a model without safetensors.

    A path that is no folder, or has no config.json, passes: transformers reports these itself.

    Args:
        folder: from `sources.location`.
        where: the recipe's key and value, for messages.

    Raises:
        ModelError: the folder is an adapter, or its weights are in another format.
    """
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{where}: expected a whole model, the folder holds a PEFT adapter"
            " (adapter_config.json); merge it into its base first (PeftModel.merge_and_unload,"
            " then save_pretrained), or name the base"
        )
    if any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        return
    other = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS)
    raise ModelError(
        f"{where}: expected weights as *.safetensors, found {', '.join(other[:3]) or 'none'};"
        " other formats are not read, since they can run code: load the model with transformers"
        " where you trust it, and write it with save_pretrained"
    )
