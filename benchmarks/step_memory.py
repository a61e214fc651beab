"""Peak memory of one training step of a language model, above the loaded model.

`python step_memory.py` measures a step of SmolLM2's shape (random weights, LoRA of rank 8 on all
linear layers, batch 2 of 512 tokens, float32 on one CPU thread) in each mode, in a process of its
own, and writes results/step_memory.json:

* `whole`: all activations kept, all logits at once, as transformers computes its loss;
* `chunked`: logits in chunks;
* `checkpointed`: activations computed again too, as `runtime.checkpoint_activations` does;
* `checkpointed, fused`: two clients of one text each in the place of one client of two texts;
* `checkpointed, bfloat16`: on a base in bfloat16 (`model.dtype`), arithmetic in float32.

Memory is the resident set, read every 2 ms, with glibc's allocator returning what is freed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

MODES = (
    "whole",
    "chunked",
    "checkpointed",
    "checkpointed, fused",
    "checkpointed, bfloat16",
)
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def resident_mb() -> float:
    """Return the resident set of this process, MB (10^6 bytes)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak:
    """The largest resident set while it is watched, above that at its beginning."""

    def __enter__(self) -> Peak:
        """Begin, with what was freed returned to the system."""
        gc.collect()
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
        libc.mallopt(_TRIM_THRESHOLD, 0)
        libc.malloc_trim(0)
        self.start_mb = self._most = resident_mb()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            self._most = max(self._most, resident_mb())

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._over.set()
        self._thread.join()

    @property
    def above_mb(self) -> float:
        """The peak above the start, MB."""
        return self._most - self.start_mb


def measured(mode: str, layers: int, batch: int, length: int) -> dict[str, Any]:
    """Compute one step; return its memory, time, loss and gradient norm."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rayfed_lora.models import language
    from rayfed_lora.models.adapted import AdaptedModel
    from rayfed_lora.models.checkpointing import Checkpointing
    from rayfed_lora.models.precision import shorten
    from rayfed_lora.recipe.model import Adapter
    from rayfed_lora.types import AdapterState, Base, Factors

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE | {"num_hidden_layers": layers})
    net = AutoModelForCausalLM.from_config(config)
    if "bfloat16" in mode:
        shorten(net, torch.bfloat16)
    model = AdaptedModel(net, Adapter(target_modules="all-linear", train_head=False))
    draw = np.random.default_rng(0)
    factors = {
        name: Factors(
            (draw.normal(size=(8, layer.in_features)) / 30).astype(np.float32),
            (draw.normal(size=(layer.out_features, 8)) / 30).astype(np.float32),
            1.0,
        )
        for name, layer in model._layers.items()
    }
    clients = batch if "fused" in mode else 1
    model.load([AdapterState(factors, {})] * clients, Base(), "adapter")
    ids = torch.from_numpy(draw.integers(3, SHAPE["vocab_size"], (batch, length)))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss = language.language_loss(net, inputs)
    model.train(True)
    Checkpointing(net).switch(on="checkpointed" in mode)
    most = {"cpu": 1 << 62} if mode == "whole" else language.LOGIT_BYTES
    with patch.object(language, "LOGIT_BYTES", most), Peak() as peak:
        began = time.process_time()
        found = loss(inputs)
        total = found.losses.sum() / found.tokens.sum()
        total.backward()
        seconds = time.process_time() - began
    # Fused clients have a gradient each, whose sum is that of one client.
    squares = [p.grad.double().sum(0).square().sum().item() for p in model.trained]
    return {
        "mode": mode,
        "above_model_mb": round(peak.above_mb),
        "model_mb": round(sum(p.numel() * p.element_size() for p in net.parameters()) / 1e6),
        "cpu_s": round(seconds, 1),
        "loss": total.item(),
        "gradient_norm": sum(squares) ** 0.5,
    }


def main() -> None:
    """Measure each mode in a process of its own, or one mode in this process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mode", choices=MODES, help="measure one mode here; print it as JSON")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    if given.mode is not None:
        print(json.dumps(measured(given.mode, given.layers, given.batch, given.length)))
        return
    rows = []
    for mode in MODES:
        own = [f"--{key}={getattr(given, key)}" for key in ("layers", "batch", "length")]
        command = [sys.executable, __file__, "--mode", mode, *own]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    facts = {"shape": SHAPE | {"num_hidden_layers": given.layers}, "batch": given.batch}
    content = {**facts, "length": given.length, "rows": rows}
    (given.to / "step_memory.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
