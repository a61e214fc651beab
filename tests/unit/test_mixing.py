"""A model is tried on a few examples before clients are computed together."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from rayfed_lora.models.mixing import Inputs, drops, verdict_on

LENGTHS, WIDTH = (2, 3, 5), 4
Part = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """A linear layer, a part to try, a mean over the tokens that are there, a head."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        self.first, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        self.runs += 1
        x = self.part(self, self.first(x), mask.unsqueeze(-1))
        pooled = (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(pooled))


def trial() -> tuple[Inputs, list[Inputs]]:
    torch.manual_seed(0)
    rows = [torch.randn(1, length, WIDTH) for length in LENGTHS]
    alone = [{"x": row, "mask": torch.ones(row.shape[:2])} for row in rows]
    padded = {
        name: torch.cat(
            [
                nn.functional.pad(each[name], (0, 0) * (each[name].dim() - 2) + (0, 5 - length))
                for each, length in zip(alone, LENGTHS, strict=True)
            ]
        )
        for name in ("x", "mask")
    }
    return padded, alone


def tried(part: Part, training: bool = True) -> str | None:
    torch.manual_seed(1)
    return found(Net(part), training)


def found(net: nn.Module, training: bool = True) -> str | None:
    """Return the reason that a run would be told of."""
    told = verdict_on(net, *trial())
    of_layers = [told.layers.get("first"), told.layers.get("head"), told.heads.get("head")]
    return next(filter(None, (told.training, *of_layers)), None) if training else told.testing


def plain(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


def over_the_tokens(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft(x, dim=1).real


def over_the_batch(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x - x.mean(0, keepdim=True)


def over_the_batch_in_training(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return over_the_batch(net, x, mask) if net.training else x


def masked(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return x - (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def test_a_model_that_keeps_its_examples_apart_has_no_obstacle() -> None:
    assert tried(plain) is None
    assert tried(masked) is None


def test_padding_that_is_mixed_in_is_seen() -> None:
    assert "mixes padding into its result" in (tried(over_the_tokens) or "")


def test_padding_is_seen_where_the_head_is_zero_at_first() -> None:
    net = Net(over_the_tokens)
    nn.init.zeros_(net.head.weight)
    assert "mixes padding" in (found(net) or "")


def test_examples_that_are_mixed_are_seen() -> None:
    assert "mixes the examples of a batch" in (tried(over_the_batch) or "")


def test_examples_that_are_mixed_in_training_only_are_seen_there_only() -> None:
    assert "mixes the examples" in (tried(over_the_batch_in_training) or "")
    assert tried(over_the_batch_in_training, training=False) is None


class Turned(Net):
    """Hands its rows to the first layer in another order: of tokens, or of examples."""

    def __init__(self, turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(plain)
        self.turn = turn

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        y = self.turn(self.first(self.turn(x)))
        pooled = (y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(pooled))


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda x: x.transpose(0, 1), "in the first dimension"),
        (lambda x: x.flip(0), "in the order of the batch"),
    ],
    ids=["tokens first", "last example first"],
)
def test_rows_of_a_layer_in_another_order_are_seen(
    turn: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    assert said in (found(Turned(turn)) or "")


def test_dropout_is_not_taken_for_a_mixture() -> None:
    drop = nn.Dropout(0.5)

    def dropped(_: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return drop(x)

    model = Net(dropped)
    model.add_module("drop", drop)
    assert drop.training
    assert found(model) is None


def test_a_model_that_raises_on_a_batch_is_told_of_and_left_as_it_was() -> None:
    def failing(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if len(x) > 1:
            raise IndexError("no such token\nand more")
        return x

    net = Net(failing).eval()
    said = "a few examples cannot be computed together (IndexError: no such token)"
    assert (found(net), found(net, training=False)) == (said, said)
    assert not net.training
    assert net.runs == 0
    assert not net.first._forward_pre_hooks


def test_a_model_that_raises_on_an_example_alone_raises() -> None:
    def failing(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise IndexError("no such token")

    with pytest.raises(IndexError, match="no such token"):
        tried(failing)


def test_an_example_that_is_too_short_for_the_model_is_compared_with_padding_only() -> None:
    def shy(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if x.shape[1] == min(LENGTHS):
            raise RuntimeError("no such short texts")
        return x

    assert tried(shy) is None
    mixed = tried(lambda *given: over_the_tokens(given[0], shy(*given), given[2]))
    assert "mixes padding" in (mixed or "")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"attention_dropout": 0.1}, True),
        ({"text_config": {"attention_dropout": 0.1}}, True),
        ({"vision_config": {"layers": [{"hidden_dropout_prob": 0.1}]}}, True),
        ({"drop_path_rate": [0.0, 0.0, 0.1]}, True),
        ({"attention_dropout": 0.0, "text_config": {"dropout": None, "width": 3}}, False),
        ({"drop_last": True, "drop_rate": [0.0, 0.0]}, False),
        # Classes, whatever they are called.
        ({"label2id": {"rain": 0, "snowdrop": 1}, "id2label": {1: "snowdrop"}}, False),
    ],
)
def test_a_rate_of_dropout_is_found_wherever_a_configuration_has_it(
    config: dict[str, Any], expected: bool
) -> None:
    net = Net(plain)
    assert not drops(net)
    net.config = SimpleNamespace(to_dict=lambda: config)  # type: ignore[assignment]
    assert drops(net) is expected


def test_dropout_of_an_inner_configuration_is_not_taken_for_a_mixture() -> None:
    def dropped(net: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, net.training)

    assert "mixes the examples" in (tried(dropped) or "")
    net = Net(dropped)
    inner = {"vision_config": {"attention_dropout": 0.5}}
    net.config = SimpleNamespace(to_dict=lambda: inner)  # type: ignore[assignment]
    assert found(net) is None
