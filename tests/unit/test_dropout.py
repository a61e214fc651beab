"""Dropout that belongs to a client: what takes torch's place computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from rayfed_lora.training.dropout import ClientDropout

CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(3)
HEADS, LENGTH, WIDTH = 4, 5, 8


def projections(heads: int = HEADS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(6, HEADS, LENGTH, WIDTH, generator=DRAW)
    key, value = (torch.randn(6, heads, LENGTH, WIDTH, generator=DRAW) for _ in range(2))
    return query, key, value


KEEP = torch.rand(6, 1, LENGTH, LENGTH, generator=DRAW) > 0.3
KEEP[..., 0] = True
BIAS = torch.randn(6, HEADS, LENGTH, LENGTH, generator=DRAW)


@pytest.mark.parametrize(
    ("heads", "settings"),
    [
        (HEADS, {}),
        (HEADS, {"scale": 0.7}),
        (HEADS, {"attn_mask": KEEP}),
        (HEADS, {"attn_mask": BIAS}),
        (HEADS, {"is_causal": True}),
        (2, {"enable_gqa": True}),
    ],
)
def test_attention_with_next_to_no_dropout_is_torchs_own(heads: int, settings: dict[str, Any]):
    query, key, value = projections(heads)
    dropout = ClientDropout([1, 2, 3], CPU)
    dropout.step([2, 2, 2])
    expected = functional.scaled_dot_product_attention(query, key, value, **settings)
    with dropout:
        # One in 10^12 entries is dropped: none of these.
        got = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=1e-12, **settings
        )
    torch.testing.assert_close(got, expected)


def draw(seeds: list[int], examples: list[int], call: Any, each: int = 1) -> torch.Tensor:
    dropout = ClientDropout(seeds, CPU)
    dropout.step(examples)
    with dropout:
        return call(len(examples) * max(examples) * each)


def dropped(rows: int) -> torch.Tensor:
    return functional.dropout(torch.ones(rows, 50), 0.4, training=True)


def by_example(rows: int) -> torch.Tensor:
    return torch.rand((rows, 50))


# Four rows an example: windows of an image. Stochastic depth draws by example only.
@pytest.mark.parametrize(("call", "each"), [(dropped, 1), (dropped, 4), (by_example, 1)])
def test_a_client_draws_in_a_group_what_it_draws_alone(call: Any, each: int) -> None:
    together = draw([7, 8], [3, 2], call, each).view(2, 3 * each, 50)
    for client, (seed, examples) in enumerate([(7, 3), (8, 2)]):
        alone = draw([seed], [examples], call, each)
        assert torch.equal(together[client, : examples * each], alone)
    assert not torch.equal(together[0, : 2 * each], together[1, : 2 * each])


def test_what_fills_a_batch_up_is_zero() -> None:
    filled = draw([7, 8], [3, 1], lambda rows: functional.dropout(torch.ones(rows, 50), 0.4))
    assert (filled.view(2, 3, 50)[1, 1:] == 0).all()


def test_a_client_alone_fills_tensors_that_do_not_begin_with_its_examples() -> None:
    # 5 positions of 16 examples, and 512 shared ones.
    for rows in (5, 512):
        found = draw([7], [16], lambda _, n=rows: functional.dropout(torch.ones(n, 50), 0.4))
        assert (found != 0).any(dim=1).all()


def test_rows_that_cannot_be_dealt_to_the_clients_are_refused() -> None:
    with pytest.raises(ValueError, match="dropout of 5 rows cannot be dealt to 2 clients of 4"):
        draw([7, 8], [4, 4], lambda _: functional.dropout(torch.ones(5, 50), 0.4))


def test_the_share_of_zeros_and_the_scale_are_those_of_dropout() -> None:
    dropped = draw([7], [100], lambda rows: functional.dropout(torch.ones(rows, 100), 0.25))
    # 10,000 draws: a standard deviation of 0.0043
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.022)
    assert dropped[dropped > 0].unique().tolist() == pytest.approx([1 / 0.75])


def test_evaluation_and_a_share_of_nothing_or_all_draw_nothing() -> None:
    ones = torch.ones(4, 50)
    same = [
        draw([7], [4], lambda rows: functional.dropout(ones, 0.4, training=False)),
        draw([7], [4], lambda rows: functional.dropout(ones, 0.0)),
    ]
    assert all(torch.equal(x, ones) for x in same)
    assert not draw([7], [4], lambda rows: functional.dropout(ones, 1.0)).any()


def test_other_random_draws_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3, 2), torch.randn(4)
    torch.manual_seed(5)
    got = draw([7], [4], lambda rows: (torch.rand(3, 2), torch.randn(4)))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
