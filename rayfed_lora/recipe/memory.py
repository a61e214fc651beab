"""Memory of a step beside the weights. Source: this project (benchmarks/step_memory.py)."""

from __future__ import annotations

from collections.abc import Mapping

from rayfed_lora.types import Device

# Logits of a language model that are computed at once, float32; a step holds about four copies.
LOGIT_BYTES: Mapping[Device, int] = {"cpu": 1 << 24, "cuda": 1 << 28}
