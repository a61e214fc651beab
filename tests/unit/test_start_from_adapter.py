"""A run that starts from a PEFT adapter (`model.adapter`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

import rayfed_lora
from rayfed_lora.aggregation.rules import RULES
from rayfed_lora.errors import ModelError, RecipeError, RunError, RunFolderError
from rayfed_lora.recipe.recipe import Recipe

# Digits and a vision transformer of one layer, in adapter rounds alone.
SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "max_examples": 120, "partition": {"clients": 4, "kind": "iid"}},
    "model": {
        "config": {
            "architecture": "vit",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 8,
            "patch_size": 4,
        }
    },
    "adapter": {"alpha": 8.0},
    "annealing": {
        "initiating": {"trainable": "none"},
        "heating": {"rounds": 2, "rank": 4},
        "cooling": {"rounds": 1, "rank": 2},
        "holding": {"rounds": 0},
    },
    "clients": {"per_round": 2, "local_steps": 3, "batch_size": 8, "optimizer": {"lr": 0.2}},
    "runtime": {"executor": "local", "device": "cpu", "client_actors": 1},
}
# Nothing is learned: what comes out is what went in, but for rounding.
STILL = {"clients.optimizer.lr": 1e-12, "clients.local_steps": 1}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, whose random base is in base/."""
    folder = tmp_path_factory.mktemp("first") / "run"
    rayfed_lora.run(SMALL, str(folder))
    return folder


def next_run(before: Path, **changes: Any) -> Recipe:
    """A recipe that goes on from a run's model."""
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    model = {"source": str(before / "base"), "adapter": str(before)}
    return rayfed_lora.Recipe.load({**SMALL, "model": model}).with_(keys)


def logits(folder: Path, batch: int = 6) -> Any:
    """The logits of an exported model for random images, by transformers and peft."""
    net = rayfed_lora.Result.open(str(folder)).model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pixels = torch.randn(batch, 1, 8, 8, generator=generator)
        return net(pixel_values=pixels).logits.numpy()


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if not rule.personal])
def test_a_run_starts_as_the_run_before_ended_under_every_rule(
    before: Path, tmp_path: Path, rule: str
) -> None:
    recipe = next_run(
        before, aggregation__rule=rule, annealing__mode="fixed", **{"annealing__heating__rank": 2}
    ).with_({**STILL, "clients.per_round": 4})
    rayfed_lora.run(recipe, str(tmp_path / "a"))
    np.testing.assert_allclose(logits(tmp_path / "a"), logits(before), atol=2e-5)


def test_a_higher_rank_keeps_the_model_a_lower_one_is_its_best_approximation(
    before: Path, tmp_path: Path
) -> None:
    higher = next_run(before, annealing__mode="fixed", annealing__heating__rank=6).with_(STILL)
    rayfed_lora.run(higher, str(tmp_path / "a"))
    np.testing.assert_allclose(logits(tmp_path / "a"), logits(before), atol=2e-5)
    lower = next_run(before, annealing__mode="fixed", annealing__heating__rank=1).with_(STILL)
    assert any("has rank 2, the first round has rank 1" in n for n in rayfed_lora.plan(lower).notes)
    rayfed_lora.run(lower, str(tmp_path / "b"))

    def update(folder: Path) -> Any:
        """The effective update of the first module, by name."""
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        own = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        name = sorted(key for key in found if key.endswith("lora_A.weight"))[0]
        b = found[name.replace("lora_A", "lora_B")]
        return b @ found[name] * own["lora_alpha"] / own["r"]

    u, s, vt = np.linalg.svd(update(before))
    np.testing.assert_allclose(update(tmp_path / "b"), s[0] * np.outer(u[:, 0], vt[0]), atol=1e-5)


def test_it_resumes_and_another_adapter_is_told(before: Path, tmp_path: Path) -> None:
    own = tmp_path / "adapter"
    own.mkdir()
    for file in (before / "adapter").iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    recipe = next_run(before, model__adapter=str(own))
    whole = rayfed_lora.run(recipe, str(tmp_path / "a")).summary

    def broken(done: rayfed_lora.FinishedRound) -> None:
        assert done.record.round < 1

    with pytest.raises(RunError):
        rayfed_lora.run(recipe, str(tmp_path / "b"), callbacks=[broken])
    tensors = load_file(own / "adapter_model.safetensors")
    again = rayfed_lora.run(recipe, str(tmp_path / "b"), resume=True).summary
    assert again["adapter_sha256"] == whole["adapter_sha256"]
    with pytest.raises(RunError):
        rayfed_lora.run(recipe, str(tmp_path / "c"), callbacks=[broken])
    save_file(
        {name: values * 2 for name, values in tensors.items()}, own / "adapter_model.safetensors"
    )
    with pytest.raises(RunFolderError, match="these differ: the adapter to start from"):
        rayfed_lora.run(recipe, str(tmp_path / "c"), resume=True)


def test_frozen_factors_and_a_head_that_rounds_do_not_send_are_billed_once(
    before: Path, tmp_path: Path
) -> None:
    """A is 2 x 16 for query and value: 64 values for each of 2 clients, in the first round."""
    frozen = next_run(
        before, method="ffa-lora", annealing__mode="fixed", annealing__heating__rank=2
    ).with_({"clients.per_round": 4})
    fresh = frozen.with_({"model.adapter": None})
    found = []
    for name, recipe in (("a", frozen), ("b", fresh)):
        rayfed_lora.run(recipe, str(tmp_path / name))
        planned = [r.bytes_base for r in rayfed_lora.plan(recipe).rounds]
        rows = pq.read_table(tmp_path / name / "rounds.parquet")
        assert rows["bytes_base"].to_pylist() == planned
        found.append(planned)
    given, drawn = found
    assert [x - y for x, y in zip(given, drawn, strict=True)] == [4 * 64 * 4, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "expected plain LoRA, use_dora False"),
        ({"bias": "all"}, "expected plain LoRA, bias 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights True .* got 'pissa'"),
        (
            {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
            "expected plain LoRA, alora_invocation_tokens None",
        ),
        ({"use_qalora": True}, "expected plain LoRA, use_qalora False"),
        ({"peft_type": "IA3"}, "model.adapter"),
        ({"target_modules": ["key"]}, "model.adapter"),
        ({"r": 3}, r"expected shape \(3, 16\).* got \(2, 16\)"),
    ],
)
def test_what_is_no_plain_lora_of_this_model_is_rejected(
    before: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for file in (before / "adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ModelError, match=message):
        rayfed_lora.plan(next_run(before, model__adapter=str(tmp_path)))


def test_modules_that_the_run_does_not_adapt_are_named(before: Path) -> None:
    recipe = next_run(before, adapter__target_modules=["q_proj"])
    with pytest.raises(
        ModelError, match=r"adapter.target_modules: .*q_proj.* it has some of .*v_proj"
    ):
        rayfed_lora.plan(recipe)


def test_a_head_that_the_run_does_not_train_is_rejected(before: Path) -> None:
    with pytest.raises(ModelError, match="trained values of classifier"):
        rayfed_lora.plan(next_run(before, adapter__train_head=False))


@pytest.mark.parametrize("missing", ["", "nothing"])
def test_a_folder_without_an_adapter_is_rejected(
    before: Path, tmp_path: Path, missing: str
) -> None:
    with pytest.raises(ModelError, match=r"expected a folder with a PEFT adapter"):
        rayfed_lora.plan(next_run(before, model__adapter=str(tmp_path / missing)))


@pytest.mark.parametrize(
    "own", [{"annealing.mode": "full"}, {"annealing.initiating.trainable": "full"}]
)
def test_full_model_rounds_have_no_use_for_it(before: Path, own: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="expected null with full-model rounds"):
        next_run(before).with_({"annealing.initiating.rounds": 1, **own})


def test_clients_with_a_b_of_their_own_would_not_start_from_it(before: Path) -> None:
    with pytest.raises(RecipeError, match="whose clients start from a B of their own"):
        next_run(before, method="fedsa-lora")


def test_another_base_is_told(before: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    other.mkdir()
    for file in (before / "base").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    notes = rayfed_lora.plan(next_run(before, model__source=str(other))).notes
    assert any("was trained on" in note for note in notes)
    assert not any("was trained on" in note for note in rayfed_lora.plan(next_run(before)).notes)
