"""What `plan` accepts, `run` can do; the rest gets one message from both, before anything starts.

Every model here is tiny; those that are not are refused without being built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.errors import BadInputError
from rayfed_lora.launching import launch, planning
from rayfed_lora.models import limits
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from tests.small_sources import write_words

Values = dict[str, Any]
COMMON: Values = {
    "annealing": {
        "initiating": {"rounds": 1, "lr": 0.02},
        "heating": {"rounds": 1, "rank": 2},
        "cooling": {"rounds": 0, "rank": 1},
        "holding": {"rounds": 0},
    },
    "clients": {"per_round": 2, "local_steps": 1, "batch_size": 4},
    "evaluation": {"every": 2},
    "runtime": {"executor": "local", "device": "cpu"},
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
MIXTRAL = TEXT | {"num_local_experts": 2, "num_experts_per_tok": 1, "num_key_value_heads": 2}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 4,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
LEVIT = {
    "hidden_sizes": [16, 16, 16],
    "num_attention_heads": [2, 2, 2],
    "depths": [1, 1, 1],
    "key_dim": [8, 8, 8],
    "patch_size": 2,
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
}
SIZES: dict[str, Values] = {
    "levit": LEVIT,
    "vit": VIT,
    "resnet": RESNET,
    "bert": TEXT,
    "roberta": TEXT,
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "llama": TEXT | {"num_key_value_heads": 2},
    "mixtral": MIXTRAL,
    "distilbert": {"dim": 16, "n_heads": 2, "n_layers": 1, "hidden_dim": 16},
}
TASKS = dict.fromkeys(("vit", "resnet", "levit"), "image-classification") | dict.fromkeys(
    ("gpt2", "llama", "mixtral"), "causal-lm"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("words"))


def recipe(words: Path, architecture: str, own: Values, overrides: Values) -> Recipe:
    task = overrides.pop("task", TASKS.get(architecture, "text-classification"))
    config = {"architecture": architecture, **SIZES.get(architecture, {}), **own}
    values = {
        **COMMON,
        "data": {"source": "digits", "max_examples": 60, "partition": {"clients": 6}},
        "model": {"task": task, "config": config},
    }
    if task != "image-classification":
        partition = {"clients": 6, "kind": "iid"}
        source = str(words / "texts.jsonl")
        values["data"] = {"source": source, "max_length": 8, "partition": partition}
        values["model"]["tokenizer"] = str(words / "tokenizer")
    if task == "causal-lm":
        values["adapter"] = {"train_head": False}
    return load_recipe(values, overrides)


# Architecture, values of its configuration, what the message says, other values of the recipe.
BAD: list[tuple[Any, ...]] = [
    ("vit", {"patch_size": 1000}, r"config\.patch_size: .* got patch_size 1000"),
    ("vit", {"patch_size": 16}, r"config\.patch_size: .* got patch_size 16"),
    ("vit", {"patch_size": 0}, r"config\.patch_size: .* got patch_size 0"),
    ("vit", {"patch_size": -1}, r"config\.patch_size: .* got patch_size -1"),
    ("vit", {"patch_size": "a"}, r"config\.patch_size: .*got str"),
    ("vit", {"patch_size": 2.5}, r"config\.patch_size: .*got float"),
    ("vit", {"return_dict": False}, r"config\.return_dict: expected true, .* got False"),
    ("vit", {"output_attentions": True}, r"config\.output_attentions: expected false, .* got True"),
    ("vit", {"output_hidden_states": True}, r"config\.output_hidden_states: expected false"),
    ("vit", {"use_cache": False}, r"config\.use_cache: expected a key of ViTConfig"),
    ("vit", {"hidden_size": 0}, r"config\.hidden_size: .* got hidden_size 0"),
    ("vit", {"hidden_size": -1}, r"config\.hidden_size: .* got hidden_size -1"),
    ("vit", {"hidden_size": 10**9}, r"config\.hidden_size: expected at most 100,000,000, got"),
    ("vit", {"hidden_size": 10**6}, r"config\.hidden_size: .* expected a model of at most 4000"),
    ("vit", {"hidden_size": None}, r"config\.hidden_size: .*expected int"),
    ("vit", {"hidden_size": {"a": 1}}, r"config\.hidden_size: .*expected int"),
    ("vit", {"num_attention_heads": 0}, r"config\.num_attention_heads: .* got num_attention_heads"),
    ("vit", {"num_attention_heads": 32}, r"config\.num_attention_heads"),
    ("vit", {"num_attention_heads": 2.0}, r"config\.num_attention_heads: .*got float"),
    ("vit", {"num_hidden_layers": 10**5}, r"config\.num_hidden_layers: expected 0 to 10,000, got"),
    ("vit", {"num_hidden_layers": -1}, r"config\.num_hidden_layers: expected 0 to 10,000, got -1"),
    ("vit", {"intermediate_size": 0}, r"config\.intermediate_size: .* at least 1, .* is 0 x 16"),
    ("vit", {"image_size": 16}, r"model\.config: expected images of 1 x 16 x 16"),
    ("vit", {"image_size": [8, 4]}, r"model\.config: .* \(8\*8\) doesn't match model \(8\*4\)"),
    ("vit", {"image_size": 0}, r"model\.config"),
    ("vit", {"num_channels": 3}, r"model\.config: expected images of 3 x 8 x 8"),
    ("vit", {"hidden_dropout_prob": 1.5}, r"config\.hidden_dropout_prob: expected 0 to 1, got"),
    ("vit", {"hidden_dropout_prob": -0.1}, r"config\.hidden_dropout_prob: expected 0 to 1, got"),
    (
        "vit",
        {"attention_probs_dropout_prob": 2.0},
        r"config\.attention_probs_dropout_prob: expected 0 to 1, got",
    ),
    ("vit", {"attention_probs_dropout_prob": -1.0}, r"dropout_prob: expected 0 to 1, got -1"),
    ("vit", {"initializer_range": 1e30}, r"initializer_range: .* all are NaN"),
    ("vit", {"model_type": "bert"}, r"config\.model_type: expected the key architecture"),
    ("vit", {"hidden_act": "nope"}, r"config\.hidden_act: .* got hidden_act 'nope'"),
    ("vit", {"layer_norm_eps": "a"}, r"config\.layer_norm_eps: .*got str"),
    ("vit", {"num_labels": 3}, r"config\.num_labels: expected 10, the classes in the data, got 3"),
    ("vit", {"id2label": 3}, r"config\.id2label"),
    (
        "vitt",
        {},
        r"config\.architecture: .* got 'vitt' \(did you mean 'vit'",
        {"task": "image-classification"},
    ),
    (
        "bert",
        {},
        r"no model of type 'bert' for model\.task 'image",
        {"task": "image-classification"},
    ),
    (
        "resnet",
        {"hidden_sizes": [0, 0]},
        r"config\.hidden_sizes: .* got",
        {"annealing.mode": "full"},
    ),
    (
        "resnet",
        {},
        r"clients\.batch_size: .* single",
        {
            "annealing.mode": "full",
            # Six clients of ten images each: a batch of nine, and one of one.
            "data.partition.kind": "iid",
            "clients.local_steps": None,
            "clients.local_epochs": 1,
            "clients.batch_size": 9,
        },
    ),
    (
        "resnet",
        {},
        r"clients\.batch_size: .* single",
        {"annealing.mode": "full", "clients.batch_size": 1},
    ),
    ("levit", {}, r"LevitForImageClassification cannot compute a batch"),
    # It would be built in 2048 ** 4 steps.
    ("levit", {"image_size": 4096}, r"model\.config: expected images of 1 x 4096 x 4096"),
    ("bert", {"hidden_size": 15}, r"hidden_size.*num_attention_heads"),
    ("bert", {"num_attention_heads": 3}, r"num_attention_heads"),
    ("bert", {"hidden_size": 10**13}, r"config\.hidden_size: expected at most"),
    (
        "bert",
        {"max_position_embeddings": 4},
        r"data\.max_length: expected at most 4, .* has [5-8] tok",
    ),
    ("bert", {"max_position_embeddings": -1}, r"config\.max_position_embeddings: .* got"),
    ("roberta", {"max_position_embeddings": 6}, r"data\.max_length: expected at most 5, "),
    ("bert", {"vocab_size": 5}, r"model\.tokenizer: expected tokens below 5"),
    ("bert", {"vocab_size": 0}, r"model\.config"),
    ("bert", {"pad_token_id": 99}, r"pad_token_id"),
    ("bert", {"hidden_act": "nope"}, r"config\.hidden_act: .* got"),
    ("bert", {"classifier_dropout": 3.0}, r"config\.classifier_dropout: expected 0 to 1, got"),
    ("bert", {"chunk_size_feed_forward": 3}, r"config\.chunk_size_feed_forward: .* got"),
    ("vit", {}, r"no model of type 'vit' for model\.task 'text", {"task": "text-classification"}),
    ("distilbert", {"n_heads": 3}, r"n_heads"),
    ("gpt2", {"n_embd": 15}, r"n_embd"),
    ("gpt2", {"n_embd": 10**7, "n_head": 2}, r"n_embd: .* expected a model of at most 4000"),
    ("gpt2", {"n_layer": 10**5}, r"config\.n_layer: expected 0 to 10,000, got 100,000"),
    ("gpt2", {"n_positions": 2}, r"data\.max_length: expected at most 2"),
    ("gpt2", {"vocab_size": 3}, r"model\.tokenizer: expected tokens below 3"),
    ("gpt2", {"resid_pdrop": 2.0}, r"config\.resid_pdrop: expected 0 to 1, got"),
    ("gpt2", {"activation_function": "nope"}, r"config\.activation_function: .* got"),
    ("gpt2", {"return_dict": False}, r"config\.return_dict: expected true"),
    ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads"),
    ("llama", {"head_dim": 7}, r"head_dim"),
    ("llama", {"attention_dropout": 2.0}, r"config\.attention_dropout: expected 0 to 1, got"),
    ("llama", {"rope_scaling": 3}, r"rope_"),
    ("mixtral", {"num_experts_per_tok": 5}, r"num_experts_per_tok"),
    ("mixtral", {"num_local_experts": 10**9}, r"config\.num_local_experts: expected 0 to 10,000"),
    ("bert", {}, r"sees the tokens that it is to predict", {"task": "causal-lm"}),
]
# Odd, and right.
RIGHT: list[tuple[Any, ...]] = [
    ("vit", {"patch_size": 3}),
    ("vit", {"patch_size": [4, 2]}),
    ("vit", {"hidden_size": 15}),
    ("vit", {"hidden_dropout_prob": 1.0}),
    ("vit", {"num_hidden_layers": 30, "hidden_size": 2}),
    ("deit", VIT, {"task": "image-classification"}),
    ("resnet", {}, {"annealing.mode": "full"}),
    ("bert", {"use_cache": False}),
    ("bert", {"max_position_embeddings": 8}),
    ("bert", {"chunk_size_feed_forward": 1}),
    ("gpt2", {"n_positions": 8}),
    ("gpt2", {"use_cache": False}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt2", {}, {"task": "text-classification"}),
    ("llama", {"num_key_value_heads": 1}),
]


def named(case: tuple[Any, ...]) -> str:
    return f"{case[0]} {case[1] or ''}{case[-1] if isinstance(case[-1], dict) else ''}"


@pytest.mark.parametrize("case", BAD, ids=named)
def test_what_no_run_can_do_is_told_by_plan_and_run_before_anything_starts(
    case: tuple[Any, ...], words: Path, tmp_path: Path
) -> None:
    architecture, own, message, *others = case
    bad = recipe(words, architecture, own, dict(*others))
    with pytest.raises(BadInputError, match=message) as planned:
        planning.plan(bad)
    with pytest.raises(BadInputError, match=message) as run:
        launch.run(bad, str(tmp_path / "run"))
    assert planned.value.exit_status == run.value.exit_status == 2
    assert "Traceback" not in str(planned.value)
    assert not (tmp_path / "run" / "rounds.parquet").exists()


@pytest.mark.parametrize("case", RIGHT, ids=named)
def test_what_a_plan_accepts_runs_to_its_end(
    case: tuple[Any, ...], words: Path, tmp_path: Path
) -> None:
    architecture, own, *others = case
    odd = recipe(words, architecture, own, dict(*others))
    planned = planning.plan(odd)
    done = launch.run(odd, str(tmp_path / "run"))
    assert planned.totals.communication() == done.summary["communication"]


def test_a_model_of_too_many_modules_is_given_up_while_it_is_built(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_MODULES", 200)
    planning.plan(recipe(words, "bert", {"num_hidden_layers": 2}, {}))
    with pytest.raises(BadInputError, match=r"num_hidden_layers: .* at most 200 modules"):
        planning.plan(recipe(words, "bert", {"num_hidden_layers": 20}, {}))


def test_a_model_larger_than_the_memory_of_this_machine_is_refused_where_it_would_run(
    words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = recipe(words, "bert", {}, {})
    monkeypatch.setattr(limits, "memory_bytes", lambda: 10_000)
    for refusing in (planning.plan, launch.run):
        with pytest.raises(BadInputError, match=r"at most 10\.00 kB, the memory of this machine"):
            refusing(small)
    # The machines of a cluster are unknown to a plan.
    planning.plan(recipe(words, "bert", {}, {"runtime.executor": "ray"}))


def test_a_text_that_is_too_long_is_found_wherever_it_is(words: Path, tmp_path: Path) -> None:
    lines = (words / "texts.jsonl").read_text().splitlines() * 10
    # Few characters, many tokens: not among the longest by characters.
    lines.insert(100, '{"text": "a b c d e f g h", "label": "c0"}')
    source = tmp_path / "texts.jsonl"
    source.write_text("\n".join(lines) + "\n")
    own = {"data.source": str(source), "data.max_length": 64}
    bad = recipe(words, "bert", {"max_position_embeddings": 7}, own)
    for refusing in (planning.plan, launch.run):
        with pytest.raises(BadInputError, match=r"at most 7, .* longest text has 8 tokens"):
            refusing(bad)
