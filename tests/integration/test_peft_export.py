"""What a run leaves behind, loaded by plain peft and transformers, has the metrics it reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rayfed_lora.cli import commands as cli
from rayfed_lora.data.workload import Workload
from rayfed_lora.errors import ModelError
from rayfed_lora.launching import launch
from rayfed_lora.launching.planning import plan
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.tasks.messages import Export
from rayfed_lora.training.preparing import prepare
from rayfed_lora.training.trainer import LocalTrainer
from rayfed_lora.types import AdapterState, Base, Factors, GlobalModel
from tests.tasks import initial_tensors, predict

# PEFT asks transformers 5 for a property that it is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

RECIPE: dict[str, Any] = {
    "name": "exported",
    "data": {"source": "digits", "max_examples": 90, "partition": {"clients": 6}},
    "model": {
        "config": {
            "architecture": "vit",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "patch_size": 4,
        }
    },
    "annealing": {
        "initiating": {"rounds": 1},
        "heating": {"rounds": 1, "rank": 4},
        "cooling": {"rounds": 2, "rank": 2, "shape": "linear"},
        "holding": {"rounds": 1},
    },
    "clients": {
        "per_round": 3,
        "local_steps": 4,
        "batch_size": 8,
        "optimizer": {"name": "adamw", "lr": 0.01},
    },
    "evaluation": {"every": 5},
    "runtime": {"executor": "local", "device": "cpu"},
}
RECIPES: dict[str, dict[str, Any]] = {
    "after a full initiating stage": {},
    "adapter only": {"annealing.initiating.trainable": "adapter"},
    "folded residuals": {"annealing.cooling.residual": "fold"},
    "folded residuals on the source": {
        "annealing.cooling.residual": "fold",
        "annealing.initiating.trainable": "none",
    },
    "spectral": {"annealing.allocation": "spectral", "adapter.target_modules": "all-linear"},
    "rslora": {"adapter.scaling": "rslora", "aggregation.rule": "product-svd"},
    "frozen head": {"adapter.train_head": False},
    "rank zero": {"annealing.cooling.rank": 0},
}
WORDS = ["how", "many", "who", "is", "where", "the", "dog", "cat", "moon", "far", "old"]


@dataclass(frozen=True)
class Run:
    """A finished run, and the data it was tested on."""

    recipe: Recipe
    folder: Path
    summary: dict[str, Any]

    @property
    def workload(self) -> Workload:
        return prepare(self.recipe)


def finished_run(folder: Path, recipe: Recipe) -> Run:
    return Run(recipe, folder, dict(launch.run(recipe, str(folder)).summary))


@pytest.fixture(scope="module", params=RECIPES)
def lora_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that ends with an adapter."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return finished_run(folder, load_recipe(RECIPE, RECIPES[request.param]))


@pytest.fixture(scope="module")
def fedavg_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("fedavg") / "run"
    return finished_run(folder, load_recipe(RECIPE, {"method": "fedavg"}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of two layers, its tokenizer and a table of questions."""
    folder = tmp_path_factory.mktemp("source")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(str(folder))
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=len(fast),
        max_position_embeddings=16,
        initializer_range=0.2,
        num_labels=2,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(str(folder))
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(WORDS, size=1 + i % 6)), "label": f"kind {i % 2}"}
        for i in range(80)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(lines)
    return folder


def text_recipe(source: Path, **config: Any) -> Recipe:
    model = {"task": "text-classification", "source": str(source), "config": config}
    data = {"source": str(source / "questions.jsonl"), "partition": {"kind": "iid", "clients": 6}}
    overrides = {"annealing.initiating.trainable": "adapter"}
    return load_recipe({**RECIPE, "model": model, "data": data}, overrides)


def metrics(net: torch.nn.Module, workload: Workload) -> dict[str, Any]:
    """Return accuracy and mean loss of a model on the test split, all at once."""
    inputs = {name: torch.tensor(v) for name, v in workload.test.inputs.items()}
    inputs = {n: t if t.is_floating_point() else t.long() for n, t in inputs.items()}
    labels = torch.tensor(workload.test.labels)
    net.eval()
    with torch.no_grad():
        logits = net(**inputs).logits
    return {
        "eval_accuracy": float((logits.argmax(1) == labels).double().mean()),
        "eval_loss": float(functional.cross_entropy(logits, labels)),
    }


def assert_final(run: Run, found: dict[str, Any]) -> None:
    final = run.summary["final"]
    assert found["eval_accuracy"] == final["eval_accuracy"]
    assert found["eval_loss"] == pytest.approx(final["eval_loss"], abs=1e-5)


def plain_peft(folder: Path) -> PeftModel:
    base = AutoModelForImageClassification.from_pretrained(str(folder / "base"))
    return PeftModel.from_pretrained(base, str(folder / "adapter"))


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run the command line in this process; return status, output and errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["rayfed-lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    yield run


def test_plain_peft_reaches_the_final_metrics(lora_run: Run) -> None:
    assert_final(lora_run, metrics(plain_peft(lora_run.folder), lora_run.workload))


def test_without_its_factors_the_model_is_another_one(lora_run: Run) -> None:
    net = plain_peft(lora_run.folder)
    with net.disable_adapter():
        without = metrics(net, lora_run.workload)["eval_loss"]
    moved = abs(without - lora_run.summary["final"]["eval_loss"])
    has_factors = lora_run.recipe.annealing.cooling.rank > 0
    assert (moved > 1e-4) == has_factors


def test_the_merged_model_reaches_the_final_metrics(
    lora_run: Run, command: Command, tmp_path: Path
) -> None:
    status, out, err = command("export", lora_run.folder, "--to", tmp_path / "merged", "--merge")
    assert (status, err) == (0, "")
    assert str(tmp_path / "merged") in out.replace("\n", "")
    net = AutoModelForImageClassification.from_pretrained(str(tmp_path / "merged"))
    assert_final(lora_run, metrics(net, lora_run.workload))
    assert net.config.id2label == {i: str(i) for i in range(10)}


@pytest.mark.parametrize("lora_run", ["adapter only"], indirect=True)
def test_a_merged_export_says_where_it_is_and_nothing_else(lora_run: Run, tmp_path: Path) -> None:
    program = "from rayfed_lora.cli.commands import main; main()"
    folder, target = str(lora_run.folder), str(tmp_path / "merged")
    done = subprocess.run(
        [sys.executable, "-c", program, "export", folder, "--to", target, "--merge"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"merged model: {target}\n", "")


def test_the_exported_adapter_and_base_are_those_of_the_run(
    lora_run: Run, command: Command, tmp_path: Path
) -> None:
    status, _, _ = command("export", lora_run.folder, "--to", tmp_path)
    assert status == 0
    base = AutoModelForImageClassification.from_pretrained(str(tmp_path / "base"))
    net = PeftModel.from_pretrained(base, str(tmp_path))
    assert_final(lora_run, metrics(net, lora_run.workload))


def test_the_adapter_alone_names_the_folder_that_its_base_is_in(lora_run: Run) -> None:
    config = json.loads((lora_run.folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(lora_run.folder / "base")
    for name in ("base/config.json", "summary.json"):
        assert str(lora_run.folder.parent) not in (lora_run.folder / name).read_text()


def test_a_full_model_run_leaves_a_plain_model_with_the_final_metrics(fedavg_run: Run) -> None:
    assert not (fedavg_run.folder / "adapter").exists()
    net = AutoModelForImageClassification.from_pretrained(str(fedavg_run.folder / "base"))
    assert_final(fedavg_run, metrics(net, fedavg_run.workload))


def test_a_full_model_run_is_exported_by_merge_only(
    fedavg_run: Run, command: Command, tmp_path: Path
) -> None:
    status, _, err = command("export", fedavg_run.folder, "--to", tmp_path / "adapter")
    assert (status, "--merge" in err) == (2, True)
    assert not (tmp_path / "adapter").exists()
    status, _, _ = command("export", fedavg_run.folder, "--to", tmp_path / "merged", "--merge")
    assert status == 0
    net = AutoModelForImageClassification.from_pretrained(str(tmp_path / "merged"))
    assert_final(fedavg_run, metrics(net, fedavg_run.workload))


@pytest.mark.parametrize("ranks", [(0, 3, 1, 0), (0, 0, 0, 0)], ids=["some", "none"])
def test_modules_of_rank_zero_are_left_out_and_the_rest_computes_the_same(
    ranks: tuple[int, ...], tmp_path: Path
) -> None:
    recipe = load_recipe(RECIPE)
    workload = prepare(recipe)
    trainer = LocalTrainer(recipe, workload)
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.5, shape).astype(np.float32)

    factors = {
        name: Factors(normal(rank, shape.d_in), normal(shape.d_out, rank), 1.7)
        for (name, shape), rank in zip(trainer.shape().modules.items(), ranks, strict=True)
    }
    head = {n: normal(*t.shape) for n, t in initial_tensors(trainer, "adapter").items()}
    state = AdapterState(factors, head)
    for name, content in trainer.run(Export(GlobalModel(state, Base(), "adapter"))).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    rows = len(workload.test)
    said = predict(trainer, slice(0, rows), state)
    found = metrics(plain_peft(tmp_path), workload)
    assert found["eval_accuracy"] == said.correct.sum() / rows
    assert found["eval_loss"] == pytest.approx(said.losses.mean(), abs=1e-5)


@pytest.mark.parametrize("method", ["fedavg", "head-only", "bitfit"])
def test_a_model_without_layers_for_factors_runs_and_is_exported_as_a_whole(
    method: str, command: Command, tmp_path: Path
) -> None:
    config = {"architecture": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    recipe = load_recipe({**RECIPE, "model": {"config": config}}, {"method": method})
    planned = plan(recipe)
    assert dict(planned.outline.shape.modules) == {}
    assert "BatchNorm2d" in (planned.outline.shape.obstacle or "")
    run = finished_run(tmp_path / "run", recipe)
    assert not (run.folder / "adapter").exists()
    status, _, err = command("export", run.folder, "--to", tmp_path / "adapter")
    assert (status, "has no adapter" in err) == (2, True)
    status, _, _ = command("export", run.folder, "--to", tmp_path / "merged", "--merge")
    assert status == 0
    net = AutoModelForImageClassification.from_pretrained(str(tmp_path / "merged"))
    assert_final(run, metrics(net, run.workload))
    assert (
        planned.rounds[0].trainable_params
        == {
            "fedavg": sum(p.numel() for p in net.parameters()),
            "head-only": 8 * 10 + 10,
            "bitfit": 8 * 10
            + sum(p.numel() for n, p in net.named_parameters() if n.endswith("bias")),
        }[method]
    )


def test_a_gpt2_run_ends_with_an_adapter_that_plain_peft_reads(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(source, folder)
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 13}
    torch.manual_seed(0)
    config = GPT2Config(**sizes, **ends, num_labels=2, initializer_range=0.2)
    GPT2ForSequenceClassification(config).save_pretrained(str(folder))
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    recipe = text_recipe(folder, **rates)
    folded = recipe.annealing.cooling.model_copy(update={"residual": "fold"})
    annealing = recipe.annealing.model_copy(update={"cooling": folded})
    run = finished_run(tmp_path / "run", recipe.model_copy(update={"annealing": annealing}))
    said = json.loads((run.folder / "adapter/adapter_config.json").read_text())
    assert said["fan_in_fan_out"] is True
    assert_final(run, text_metrics(run.folder / "base", run.folder / "adapter", run))


def text_metrics(base: Path, adapter: Path, run: Run) -> dict[str, Any]:
    net = AutoModelForSequenceClassification.from_pretrained(str(base))
    return metrics(PeftModel.from_pretrained(net, str(adapter)), run.workload)


def test_on_an_unchanged_source_the_adapter_alone_is_kept(
    source: Path, command: Command, tmp_path: Path
) -> None:
    run = finished_run(tmp_path / "run", text_recipe(source))
    assert not (run.folder / "base").exists()
    assert_final(run, text_metrics(source, run.folder / "adapter", run))
    status, _, _ = command("export", run.folder, "--to", tmp_path / "merged", "--merge")
    assert status == 0
    merged = str(tmp_path / "merged")
    net = AutoModelForSequenceClassification.from_pretrained(merged)
    assert_final(run, metrics(net, run.workload))
    assert net.config.id2label == {0: "kind 0", 1: "kind 1"}
    ids = AutoTokenizer.from_pretrained(merged)("who is far")["input_ids"]
    assert ids == [2 + WORDS.index(word) for word in ("who", "is", "far")]


def test_weights_that_the_source_lacks_are_exported_as_the_run_drew_them(
    source: Path, command: Command, tmp_path: Path
) -> None:
    # A checkpoint of a language model has no pooler, which is not of the head either.
    config = BertConfig.from_pretrained(str(source))
    masked = tmp_path / "masked"
    BertForMaskedLM(config).save_pretrained(str(masked))
    AutoTokenizer.from_pretrained(str(source)).save_pretrained(str(masked))
    shutil.copy(source / "questions.jsonl", masked)
    recipe = text_recipe(masked)
    run = finished_run(tmp_path / "run", recipe.model_copy(update={"seed": 3}))
    found = text_metrics(run.folder / "base", run.folder / "adapter", run)
    assert_final(run, found)
    status, _, _ = command("export", run.folder, "--to", tmp_path / "merged", "--merge")
    assert status == 0
    net = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    assert_final(run, metrics(net, run.workload))


def test_an_export_that_cannot_be_written_says_so(
    lora_run: Run, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for merge in ([], ["--merge"]):
        status, _, err = command("export", lora_run.folder, "--to", tmp_path / "file/to", *merge)
        assert status == 2
        assert "cannot be written" in err


def test_texts_longer_than_the_models_positions_are_refused(source: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    rows = [{"text": "dog " * (10 + i), "label": f"kind {i % 2}"} for i in range(80)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = text_recipe(source)
    data = recipe.data.model_copy(update={"source": str(long)})
    with pytest.raises(
        ModelError, match=r"data\.max_length: expected at most 16, .* has 64 tokens"
    ):
        prepare(recipe.model_copy(update={"data": data}))
    short = data.model_copy(update={"max_length": 16})
    assert (
        prepare(recipe.model_copy(update={"data": short})).train.inputs["input_ids"].shape[1] == 16
    )


def test_a_source_changed_by_the_recipe_is_exported_as_it_was_trained(
    source: Path, command: Command, tmp_path: Path
) -> None:
    # The recipe cuts the source's second layer off.
    run = finished_run(tmp_path / "run", text_recipe(source, num_hidden_layers=1))
    status, _, _ = command("export", run.folder, "--to", tmp_path / "merged", "--merge")
    assert status == 0
    net = AutoModelForSequenceClassification.from_pretrained(str(tmp_path / "merged"))
    assert_final(run, metrics(net, run.workload))


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["adapter", "merged"])
def test_an_unfinished_run_is_not_exported(
    fedavg_run: Run, command: Command, tmp_path: Path, merge: list[str]
) -> None:
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "recipe.yaml").write_bytes((fedavg_run.folder / "recipe.yaml").read_bytes())
    status, out, err = command("export", unfinished, "--to", tmp_path / "to", *merge)
    assert (status, out) == (2, "")
    assert "finished run" in err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("merge", [[], ["--merge"]], ids=["adapter", "merged"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_export_never_overwrites_anything(
    fedavg_run: Run, command: Command, tmp_path: Path, merge: list[str], kind: str
) -> None:
    target = tmp_path / "to"
    kept = target if kind == "file" else target / "notes.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    status, _, err = command("export", fedavg_run.folder, "--to", target, *merge)
    assert status == 2
    assert "expected a new or empty folder" in err
    assert kept.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
