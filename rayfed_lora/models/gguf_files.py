"""Models in a GGUF file, as folders of safetensors that are made once.

transformers reads the file (package gguf) and computes its weights in float32; the folder is what
everything else loads, exported adapters name as their base, and peft finds. Source: this project.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stderr
from functools import lru_cache
from io import StringIO
from pathlib import Path

import torch
import transformers
from huggingface_hub import constants

from rayfed_lora.errors import ModelError
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.wording import one_line
from rayfed_lora.printable import echo

SUFFIX = ".gguf"
_PIECE = 1 << 22


def converted(file: Path, subject: str) -> str:
    """Return the folder with the model of a GGUF file: config, weights, tokenizer and template.

    It lies in `$HF_HOME/rayfed-lora`, or in the folder for temporary files where that cannot be
    written, by the checksum of the file; a minute for 100 million weights, once.

    Raises:
        ModelError: the package gguf is missing, or the file cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{subject}: a GGUF file needs pip install 'rayfed-lora[gguf]'")
    try:
        facts = file.stat()
        digest = _sha256(str(file), facts.st_size, facts.st_mtime_ns)
    except OSError as error:
        raise ModelError(f"{subject}: it cannot be read: {error}") from None
    name = f"{file.stem}-{digest[:16]}"
    cache = _cache()
    folder = cache / name
    if not folder.is_dir():
        echo(f"rayfed-lora: reading {file.name}, once, into {folder}", file=sys.stderr)
        _convert(file, folder, subject)
    return str(folder)


def _cache() -> Path:
    for root in (Path(constants.HF_HOME), Path(tempfile.gettempdir())):
        cache = root / "rayfed-lora"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(cache, os.W_OK):
            return cache
    raise ModelError(f"expected $HF_HOME or {tempfile.gettempdir()} to be writable")


@lru_cache(maxsize=16)
def _sha256(file: str, size: int, changed: int) -> str:
    """Return the checksum of a file; `size` and `changed` (ns) tell versions of it apart."""
    del size, changed
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while piece := content.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _convert(file: Path, folder: Path, subject: str) -> None:
    """Write the folder, whole or not at all; another process may do the same."""
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    try:
        # Its progress bars go where nobody looks.
        with quiet(), redirect_stderr(StringIO()):
            source, name = str(file.parent), file.name
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=name)
            net = transformers.AutoModelForCausalLM.from_pretrained(
                source, gguf_file=name, dtype=torch.float32
            )
            # The weights are plain float32 now.
            net.config.__dict__.pop("quantization_config", None)
            net.hf_quantizer, net.is_quantized = None, False
            net.__dict__.pop("quantization_method", None)
            net.save_pretrained(str(scratch))
            tokenizer.save_pretrained(str(scratch))
        os.replace(scratch, folder)
    except Exception as error:  # of many types
        if not folder.is_dir():
            raise ModelError(f"{subject}: {one_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
