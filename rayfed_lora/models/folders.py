"""What a model's folder must hold, told before transformers looks into it. Source: this project."""

from __future__ import annotations

from pathlib import Path

from rayfed_lora.errors import ModelError


def check_folder(folder: Path, where: str) -> None:
    """Reject a local folder that is no model in safetensors; other places are left alone.

    Args:
        folder: from `sources.location`.
        where: the recipe's key and value, for messages.

    Raises:
        ModelError: the folder is an adapter, or its weights are in another format.
    """
    if _has(folder, "adapter_config.json"):
        raise ModelError(
            f"{where}: expected a whole model, the folder holds a PEFT adapter"
            " (adapter_config.json); merge it into its base first (PeftModel.merge_and_unload,"
            " then save_pretrained), or name the base"
        )
    if any(folder.glob("*.safetensors")) or not _has(folder, "config.json"):
        return  # transformers says what it needs of a configuration
    other = sorted(
        path.name
        for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
        for path in folder.glob(kind)
    )
    found = f"found {', '.join(other[:3])}" if other else "found none"
    raise ModelError(
        f"{where}: expected weights as *.safetensors, {found}; other formats are not read, since"
        " they can run code: load the model with transformers where you trust it, and write it"
        " with save_pretrained"
    )


def _has(folder: Path, name: str) -> bool:
    return (folder / name).is_file()
