"""A test that texts in one row do not see each other. Source: this project.

transformers' causal models take positions that begin anew for each text of a row, and let each
attend to itself alone; models without positions (ALiBi, recurrent ones) do not.
"""

from __future__ import annotations

from typing import Any

import torch

from rayfed_lora.data.examples import POSITIONS
from rayfed_lora.errors import ModelError
from rayfed_lora.models.causality import small_copy
from rayfed_lora.models.language import model_inputs
from rayfed_lora.models.linear import nearly_equal
from rayfed_lora.models.quiet import quiet
from rayfed_lora.models.wording import one_line, where
from rayfed_lora.recipe.model import Model

# Tokens of the two texts of the tested row.
_FIRST, _SECOND = 5, 7


def check_packing(model: Model, config: Any) -> None:
    """Check that a model computes two texts in a row as it does each alone.

    A small copy with random weights is tested, as in `check_causal`; a model of which there is none
    passes untested.

    Raises:
        ModelError: it does not, or takes no positions.
    """
    advice = "expected false with this model, got true"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            net = small_copy(model, config)
        except Exception:  # reported by other checks
            return
    if net is None:
        return
    try:
        same = _as_alone(net)
    except Exception as error:  # models raise errors of many types
        raise ModelError(
            f"data.packing: {advice}: {where(model)} does not take positions that begin anew for"
            f" each text of a row ({one_line(error)})"
        ) from error
    if not same:
        raise ModelError(
            f"data.packing: {advice}: {where(model)} lets the texts of a row see each other"
        )


def _as_alone(net: Any) -> bool:
    vocabulary = net.get_input_embeddings().num_embeddings
    low = min(5, vocabulary - 2)
    ids = low + torch.arange(_FIRST + _SECOND)[None] % (vocabulary - low)
    positions = torch.cat([torch.arange(_FIRST), torch.arange(_SECOND)])[None]
    net.eval()
    with torch.no_grad(), quiet():
        row = net(**model_inputs({"input_ids": ids, POSITIONS: positions})).logits
        parts = [ids[:, :_FIRST], ids[:, _FIRST:]]
        alone = [net(input_ids=x, attention_mask=torch.ones_like(x)).logits for x in parts]
    return nearly_equal(row, torch.cat(alone, dim=1))
