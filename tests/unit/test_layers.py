"""Layers with factors compute W x + scale B A x for each client, by either way."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayfed_lora.models.group_layers import AdaptedLinear, GroupFactors

CLIENTS, RANK = 3, 2
# Rows of a client: fewer than the layer's two sides together, and more.
FEW, MANY = 7, 40
D_IN, D_OUT = 10, 12


def layer(bias: bool = True, d_out: int = D_OUT) -> AdaptedLinear:
    torch.manual_seed(0)
    made = AdaptedLinear(nn.Linear(D_IN, d_out, bias=bias).requires_grad_(False), 0.0)
    a = torch.randn(CLIENTS, RANK, D_IN, requires_grad=True)
    b = torch.randn(CLIENTS, d_out, RANK, requires_grad=True)
    made.factors = GroupFactors(a, b, torch.tensor([0.5, 1.0, 2.0]).view(-1, 1, 1))
    return made


def expected(made: AdaptedLinear, x: torch.Tensor) -> torch.Tensor:
    """Client by client, with the weight that it stands for."""
    assert made.factors is not None
    factors = made.factors
    parts = [
        nn.functional.linear(rows, made.weight + s * b @ a, made.bias)
        for rows, a, b, s in zip(x.chunk(CLIENTS), factors.a, factors.b, factors.scale, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_outputs_and_gradients_are_those_of_each_client_alone(rows: int, bias: bool) -> None:
    made = layer(bias)
    assert made.factors is not None
    x = torch.randn(CLIENTS, rows, D_IN, requires_grad=True)
    trained = [x, made.factors.a, made.factors.b]
    y, reference = made(x), expected(made, x)
    torch.testing.assert_close(y, reference)
    pull = torch.randn_like(y)
    own = torch.autograd.grad(y, trained, pull)
    other = torch.autograd.grad(reference, trained, pull)
    for gradient, wanted in zip(own, other, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_a_weight_is_merged_for_many_rows_of_small_layers_and_without_gradients() -> None:
    few, many = (torch.zeros(CLIENTS, rows, D_IN) for rows in (FEW, MANY))
    made = layer()
    assert made._merges(many)
    assert not made._merges(few)
    # 10 x 1000 weights: with gradients for each client, the factors apart are less work.
    wide, plenty = layer(d_out=1000), torch.zeros(CLIENTS, 1010, D_IN)
    assert not wide._merges(plenty)
    with torch.no_grad():
        assert wide._merges(plenty)
        assert not wide._merges(many)


def test_a_weight_is_not_merged_where_it_would_be_rounded_or_its_input_dropped() -> None:
    made, many = layer(), torch.zeros(CLIENTS, MANY, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert not made._merges(many)
    made.dropout = 0.1
    assert not made._merges(many)
    assert made.eval()._merges(many)


def test_a_small_update_is_not_lost_beside_a_large_weight_in_bf16() -> None:
    made = layer()
    assert made.factors is not None
    made.weight.data = torch.zeros_like(made.weight)
    made.weight.data[:, 0], made.weight.data[:, 1] = 256.0, -256.0
    x = torch.zeros(CLIENTS, MANY, D_IN)
    # The large weights cancel out; the update does not.
    x[..., :2] = 1.0
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x).float()
    wanted = expected(made, x)
    assert wanted.abs().mean() > 0.5
    torch.testing.assert_close(y, wanted, rtol=0.05, atol=0.05)
