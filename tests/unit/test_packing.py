"""Packed rows: full, of one client each, with the loss and the gradients of single texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayfed_lora.data.client_table import ClientTable
from rayfed_lora.data.examples import COUNTED, POSITIONS, Examples
from rayfed_lora.data.packing import fitted, packed
from rayfed_lora.errors import ModelError
from rayfed_lora.launching.planning import plan
from rayfed_lora.models.language import model_inputs
from rayfed_lora.models.packing import check_packing
from rayfed_lora.recipe.model import Model
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Factors, LocalPlan
from tests.chats import character_tokenizer, chat_recipe, short_tasks, write_formats
from tests.tasks import initial_tensors, train

# Texts of 3, 5, 2 and 4 tokens.
IDS = np.array([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8], [9, 10, 0, 0, 0], [11, 12, 13, 14, 0]])
MASK = (IDS > 0).astype(np.int32)


def table(*parts: list[int]) -> ClientTable:
    offsets = np.cumsum([0, *map(len, parts)])
    return ClientTable(np.concatenate(parts).astype(np.int64), offsets.astype(np.int64))


def test_texts_of_a_client_share_rows_and_begin_anew() -> None:
    texts = Examples.of({"input_ids": IDS.astype(np.int32), "attention_mask": MASK}, np.arange(4))
    found, clients, held_out = packed(texts, table([0, 2], [1]), table([3], []), 7)
    assert found.inputs["input_ids"].tolist() == [
        [1, 2, 3, 9, 10],
        [4, 5, 6, 7, 8],
        [11, 12, 13, 14, 0],
    ]
    assert found.inputs[POSITIONS].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    # 9 follows 3, which does not predict it.
    assert found.inputs[COUNTED].tolist() == [[0, 1, 1, 0, 1], [0, 1, 1, 1, 1], [0, 1, 1, 1, 0]]
    assert [clients.examples(k).tolist() for k in (0, 1)] == [[0], [1]]
    assert held_out is not None
    assert [held_out.examples(k).tolist() for k in (0, 1)] == [[2], []]


def test_rows_are_nearly_full_and_never_too_long() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    bins = fitted(lengths, 100)
    assert sorted(place for row in bins for place in row) == list(range(500))
    sums = [int(lengths[row].sum()) for row in bins]
    assert max(sums) <= 100
    assert len(bins) <= 1.05 * lengths.sum() / 100 + 1


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_formats(folder, short_tasks(30))
    character_tokenizer().save_pretrained(str(folder / "tokenizer"))
    return folder


def start(trainer: LocalTrainer) -> AdapterState:
    draw = np.random.default_rng(1)

    def random(*shape: int) -> Any:
        return draw.normal(0, 0.2, shape).astype(np.float32)

    factors = {
        name: Factors(random(2, m.d_in), random(m.d_out, 2), 4.0)
        for name, m in trainer.shape().modules.items()
    }
    return AdapterState(factors, initial_tensors(trainer, "adapter"))


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_packed_clients_train_as_unpacked_ones_alone_and_fused(loss_on: str, chats: Path) -> None:
    # A batch of all that a client holds, in whatever order: the same sums of losses.
    own: dict[str, Any] = {"clients__batch_size": 100, "data__loss_on": loss_on}
    updates: dict[tuple[bool, str], Any] = {}
    for packing in (False, True):
        recipe = chat_recipe(chats, data__packing=packing, **own)
        workload = prepare(recipe)
        trainer = LocalTrainer(recipe, workload)
        state, round_ = start(trainer), LocalPlan(0, "adapter", 10.0, 0.0)
        assert trainer.shape().obstacle is None
        updates[packing, "fused"] = train(trainer, [0, 1, 2], state, round_)
        updates[packing, "alone"] = [train(trainer, [k], state, round_)[0] for k in range(3)]
        if packing:
            assert len(workload.train) < 24 / 2
            assert workload.train.inputs["attention_mask"].sum(axis=1).max() > 120
    for key, found in updates.items():
        for update, expected in zip(found, updates[False, "alone"], strict=True):
            assert update.train_loss == pytest.approx(expected.train_loss, rel=1e-5), key
            assert update.state is not None
            for name, factors in expected.state.factors.items():
                np.testing.assert_allclose(update.state.factors[name].a, factors.a, atol=1e-5)
                np.testing.assert_allclose(update.state.factors[name].b, factors.b, atol=1e-5)
                assert np.abs(factors.b - state.factors[name].b).max() > 1e-3


def test_a_plan_and_a_run_pack_alike_and_test_texts_alone(chats: Path) -> None:
    recipe = chat_recipe(chats, data__packing=True, evaluation__client_fraction=0.2)
    outline, workload = plan(recipe).outline, prepare(recipe)
    assert outline.devices.sizes.tolist() == workload.clients.counts.tolist()
    note = f"data.packing: 24 training texts are in {len(workload.train)} rows"
    assert any(each.startswith(note) for each in outline.notes)
    assert any(each.startswith(note) for each in workload.notes)
    single = prepare(chat_recipe(chats, evaluation__client_fraction=0.2)).held_out
    assert workload.held_out is not None
    assert single is not None
    np.testing.assert_array_equal(workload.held_out.counts, single.counts)
    assert POSITIONS not in workload.test.inputs


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 60,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "gpt_neox"]
)
def test_common_architectures_pack(architecture: str) -> None:
    config = AutoConfig.for_model(architecture, **TINY)
    model = Model(task="causal-lm", config={"architecture": architecture})
    check_packing(model, config)


@pytest.mark.parametrize("architecture", ["bloom", "mpt", "mamba"])
def test_architectures_without_positions_are_rejected(architecture: str) -> None:
    names = {"mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 60}}
    config = AutoConfig.for_model(architecture, **names.get(architecture, TINY))
    model = Model(task="causal-lm", config={"architecture": architecture})
    with pytest.raises(ModelError, match=r"data\.packing: expected false with this model, got tr"):
        check_packing(model, config)


def test_a_text_does_not_depend_on_those_beside_it() -> None:
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY)).eval()
    row = torch.tensor([[1, 2, 3, 4, 5, 6, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 0]])
    other = row.clone()
    other[0, :3] = torch.tensor([9, 8, 7])
    with torch.no_grad():
        first, second = (
            net(**model_inputs({"input_ids": ids, POSITIONS: positions, COUNTED: ids})).logits
            for ids in (row, other)
        )
    assert torch.equal(first[:, 3:], second[:, 3:])
    assert not torch.equal(first[:, :3], second[:, :3])
