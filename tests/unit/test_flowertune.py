"""The recipe flowertune-7b: its memory by plan, and the same work with a tiny model on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import rayfed_lora
from tests.chats import character_tokenizer, short_tasks, write_formats

MISTRAL_7B = {
    "architecture": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
TINY = {
    **MISTRAL_7B,
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rows")
    write_formats(made, short_tasks(90))
    character_tokenizer().save_pretrained(str(made / "tokenizer"))
    return made


def recipe(folder: Path, config: dict[str, Any], **settings: Any) -> rayfed_lora.Recipe:
    keys = {key.replace("__", "."): value for key, value in settings.items()}
    model = {"source": "config", "config": config, "tokenizer": str(folder / "tokenizer")}
    return rayfed_lora.Recipe.load("flowertune-7b").with_(
        {
            **{f"model.{name}": value for name, value in model.items()},
            "data.source": str(folder / "alpaca.jsonl"),
            "data.test_fraction": 0.2,
            **keys,
        }
    )


def test_a_card_of_24_gb_holds_two_clients_in_parts_of_four_texts(folder: Path) -> None:
    """The base has 7,248,023,552 values, all but 65 norms of 4096 in two bytes.

    Rank 32 on 32 query and value projections is 13,631,488 values a client, and adamw on them takes
    four times four bytes each.
    """
    plan = rayfed_lora.plan(
        recipe(folder, MISTRAL_7B, clients__batch_size=4, clients__accumulate=4)
    )
    gpu = plan.memory[1]
    assert gpu.device == "cuda"
    assert gpu.base == 2 * 7_248_023_552 + 2 * 65 * 4096
    assert gpu.trained == 32 * 32 * (4096 + 4096 + 4096 + 1024) * 16
    assert (gpu.fitting(24e9), gpu.fitting(80e9)) == (2, 24)


def test_it_runs_scaled_down_on_a_cpu(folder: Path, tmp_path: Path) -> None:
    small = recipe(
        folder,
        TINY,
        annealing__heating={"rounds": 1, "rank": 32},
        annealing__cooling={"rounds": 1, "rank": 8},
        annealing__holding={"rounds": 0},
        clients__local_steps=2,
        clients__batch_size=4,
        evaluation__generate={"max_new_tokens": 4, "examples": 4},
        storage__adapters_every=1,
        runtime__executor="local",
        runtime__device="cpu",
    )
    result = rayfed_lora.run(small, str(tmp_path / "run"))
    assert result.rounds["rank"].tolist() == [32, 8]
    # From 5e-5 to a fiftieth of it.
    assert result.rounds["learning_rate"].tolist() == pytest.approx([5e-5, 1e-6])
    assert result.summary["generation"]["examples"] == 4
    assert sorted(path.name for path in (tmp_path / "run" / "adapters").iterdir()) == [
        "round-000001",
        "round-000002",
    ]
