"""What a run leaves behind loads from any working directory, as its model card says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch.nn import functional
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

from rayfed_lora.errors import BadInputError
from rayfed_lora.launching import launch
from rayfed_lora.launching.exporting import export_run
from rayfed_lora.recipe.loading import load_recipe
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.training.preparing import prepare
from tests.small_sources import bert_config, saved, write_words

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

RECIPE: dict[str, Any] = {
    "name": "elsewhere",
    "data": {"partition": {"kind": "iid", "clients": 3}, "max_length": 8},
    "adapter": {"alpha": 8.0, "scaling": "constant"},
    "annealing": {
        "initiating": {"rounds": 0},
        "heating": {"rounds": 1, "rank": 4},
        "cooling": {"rounds": 1, "rank": 2},
        "holding": {"rounds": 0},
    },
    "clients": {
        "per_round": 3,
        "local_steps": 3,
        "batch_size": 8,
        "optimizer": {"name": "adamw", "lr": 0.02},
    },
    "runtime": {"executor": "local", "device": "cpu"},
}
VIT = {
    "architecture": "vit",
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 24, "patch_size": 4},
}
GPT2 = {"architecture": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Run:
    """A finished run in the folder `run` of `home`."""

    recipe: Recipe
    home: Path
    summary: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.home / "run"


def words(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    write_words(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    return {
        "data.source": str(folder / "texts.jsonl"),
        "model.tokenizer": str(folder / "tokenizer"),
    }


def classifier(folder: Path, **config: Any) -> dict[str, Any]:
    """A source in bfloat16 with four classes of other names, and texts of three classes."""
    values = words(folder)
    torch.manual_seed(0)
    names = {i: f"other {i}" for i in range(4)}
    net = BertForSequenceClassification(bert_config(id2label=names, initializer_range=0.2))
    saved(net.bfloat16(), folder / "model")
    return {
        **values,
        "model.task": "text-classification",
        "model.source": str(folder / "model"),
        "model.config": config,
    }


def language_model(folder: Path) -> dict[str, Any]:
    return {**words(folder), "model.task": "causal-lm", "model.config": GPT2}


def colours(folder: Path) -> dict[str, Any]:
    """Images of 3 x 8 x 8 whole numbers, without an image processor."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3)).tolist()
    rows = [{"image": image, "label": f"c{i % 3}"} for i, image in enumerate(pixels)]
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data.source": str(folder / "images.jsonl"), "model.config": VIT}


KINDS: dict[str, Any] = {
    "unchanged source": classifier,
    "changed source": lambda folder: classifier(folder, hidden_act="relu"),
    "language model": language_model,
    "images": colours,
    "floats": lambda _: {
        "data.source": "digits",
        "data.max_examples": 60,
        "model.config": VIT,
    },
    "full model": lambda folder: {**classifier(folder), "method": "fedavg"},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("home")
    recipe = load_recipe(RECIPE, KINDS[request.param](home / "source"))
    with pytest.MonkeyPatch.context() as patch:
        # A relative run folder, as people type it.
        patch.chdir(home)
        return Run(recipe, home, dict(launch.run(recipe, "run").summary))


def only(kind: str) -> Any:
    return pytest.mark.parametrize("run", [kind], indirect=True)


def export(run: Run, to: str, *, merge: bool = False) -> Path:
    """Export into a relative folder; return the absolute one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.home)
        if not (run.home / to).exists():
            list(export_run("run", Path(to), merge=merge))
    return run.home / to


def model_of_card(folder: Path) -> Any:
    """Run the code of a folder's card; return its model."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("image.png")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    values: dict[str, Any] = {}
    exec(code, values)
    return values["model"].eval().float()


def loss(net: Any, run: Run) -> float:
    """Return the mean loss on the test split, all at once."""
    test = prepare(run.recipe).test
    inputs = {name: torch.tensor(v) for name, v in test.inputs.items()}
    inputs = {n: t if t.is_floating_point() else t.long() for n, t in inputs.items()}
    with torch.no_grad():
        logits = net(**inputs).logits
    labels = torch.tensor(test.labels)
    if run.recipe.model.task == "causal-lm":
        hidden = inputs["attention_mask"] == 0
        labels = inputs["input_ids"].masked_fill(hidden, -100)[:, 1:].flatten()
        logits = logits[:, :-1].flatten(0, 1)
    return float(functional.cross_entropy(logits, labels))


def assert_final(net: Any, run: Run, abs_: float = 1e-5) -> None:
    assert loss(net, run) == pytest.approx(run.summary["final"]["eval_loss"], abs=abs_)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
def test_the_code_of_each_card_loads_the_model_of_the_run(run: Run) -> None:
    folders = [export(run, "merged", merge=True)]
    if (run.folder / "adapter").exists():
        folders += [run.folder / "adapter", export(run, "adapter")]
    else:
        folders += [run.folder / "base"]
    for folder in folders:
        # The source of a text classifier, hence its merged model, is stored in bfloat16.
        rough = folder.name == "merged" and run.recipe.model.task == "text-classification"
        model = model_of_card(folder)
        assert_final(model, run, 0.05 if rough else 2e-2 if rounded(run, folder) else 1e-5)
        if run.recipe.model.task != "causal-lm":
            assert [*model.config.id2label.values()] == run.summary["labels"]


def rounded(run: Run, folder: Path) -> bool:
    """Whether the code adds an adapter to a base in bfloat16."""
    config = folder / "adapter_config.json"
    if not config.exists():
        return False
    return json.loads(config.read_text())["base_model_name_or_path"] == run.recipe.model.source


@pytest.mark.usefixtures("elsewhere")
@only("changed source")
def test_peft_and_pipelines_find_the_base_from_anywhere(run: Run) -> None:
    auto = peft.AutoPeftModelForSequenceClassification
    for folder in (run.folder / "adapter", export(run, "adapter")):
        assert_final(auto.from_pretrained(str(folder)).eval(), run)
        said = pipeline("text-classification", model=str(folder))("who is far", top_k=None)
        assert {each["label"] for each in said} == {"c0", "c1", "c2"}
    merged = str(export(run, "merged", merge=True))
    again = pipeline("text-classification", model=merged)("who is far", top_k=None)
    assert [each["label"] for each in again] == [each["label"] for each in said]
    scores = [[each["score"] for each in all_] for all_ in (again, said)]
    np.testing.assert_allclose(*scores, atol=0.02)


@pytest.mark.usefixtures("elsewhere")
@only("unchanged source")
def test_peft_takes_the_names_of_classes_that_a_source_does_not_know(run: Run) -> None:
    names = dict(enumerate(run.summary["labels"]))
    net = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        str(run.folder / "adapter"),
        id2label=names,
        label2id={name: i for i, name in names.items()},
        ignore_mismatched_sizes=True,
        dtype="float32",
    )
    assert_final(net.eval(), run)


@pytest.mark.usefixtures("elsewhere")
@only("language model")
def test_a_language_model_generates_with_its_own_template(run: Run) -> None:
    folder = str(export(run, "adapter"))
    assert_final(peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval(), run)
    for place in (folder, str(export(run, "merged", merge=True))):
        assert AutoTokenizer.from_pretrained(place).chat_template == TEMPLATE
        writer = pipeline("text-generation", model=place)
        text = writer("who is", max_new_tokens=3, do_sample=False)[0]["generated_text"]
        assert text.startswith("who is")


@pytest.mark.usefixtures("elsewhere")
@only("images")
def test_an_image_pipeline_computes_what_the_run_did(run: Run) -> None:
    first = json.loads(Path(run.recipe.data.source).read_text().splitlines()[0])
    image = Image.fromarray(np.array(first["image"], np.uint8))
    for folder in (run.folder / "adapter", export(run, "merged", merge=True)):
        found = pipeline("image-classification", model=str(folder))(image)
        net = model_of_card(export(run, "merged", merge=True))
        pixels = torch.tensor(first["image"]).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            scores = net(pixel_values=pixels).logits.softmax(-1)[0]
        expected = {net.config.id2label[i]: float(score) for i, score in enumerate(scores)}
        assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-4)


@only("changed source")
def test_a_moved_run_is_exported_with_its_base(run: Run, tmp_path: Path) -> None:
    moved = run.folder.rename(run.home / "moved")
    try:
        list(export_run(str(moved), tmp_path / "to", merge=False))
        auto = peft.AutoPeftModelForSequenceClassification
        assert_final(auto.from_pretrained(str(tmp_path / "to")).eval(), run)
    finally:
        moved.rename(run.folder)


@only("unchanged source")
def test_a_merged_model_has_the_precision_of_its_source(run: Run) -> None:
    for folder in (Path(run.recipe.model.source), export(run, "merged", merge=True)):
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        header = (folder / "model.safetensors").read_bytes()[:4000]
        assert b'"BF16"' in header
        assert b'"F32"' not in header


@only("unchanged source")
def test_an_adapter_of_one_rank_needs_no_pattern(run: Run) -> None:
    assert not (run.folder / "base").exists()
    config = json.loads((run.folder / "adapter/adapter_config.json").read_text())
    # alpha / heating.rank = 8 / 4 stays, at rank 2: a reader that knows no pattern takes 4 / 2.
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["task_type"] == "SEQ_CLS"
    assert config["base_model_name_or_path"] == run.recipe.model.source


@only("unchanged source")
def test_the_digest_is_that_of_the_written_tensors(run: Run) -> None:
    from rayfed_lora.lora.states import sha256
    from rayfed_lora.types import AdapterState, Base, Factors

    tensors = load_file(run.folder / "adapter/adapter_model.safetensors")
    named = {n.removeprefix("base_model.model."): t for n, t in tensors.items()}
    modules = sorted({n.partition(".lora_")[0] for n in named if ".lora_" in n})
    factors = {
        m: Factors(named[f"{m}.lora_A.weight"], named[f"{m}.lora_B.weight"], 2.0) for m in modules
    }
    head = {name: tensor for name, tensor in named.items() if ".lora_" not in name}
    assert sha256(AdapterState(factors, head), Base()) == run.summary["adapter_sha256"]


@only("unchanged source")
def test_a_deleted_source_is_named(run: Run, tmp_path: Path) -> None:
    source = Path(run.recipe.model.source)
    away = source.rename(source.with_name("away"))
    try:
        with pytest.raises(BadInputError, match=re.escape(str(source))):
            list(export_run(str(run.folder), tmp_path / "merged", merge=True))
        said = list(export_run(str(run.folder), tmp_path / "adapter", merge=False))
        assert any(str(source) in line and line.startswith("note: ") for line in said)
    finally:
        away.rename(source)


@only("changed source")
def test_a_run_with_its_own_base_needs_no_source(run: Run, tmp_path: Path) -> None:
    source = (run.home / "source").rename(run.home / "away")
    try:
        said = list(export_run(str(run.folder), tmp_path / "merged", merge=True))
        assert "written as float32" in said[0]
        net = pipeline("text-classification", model=str(tmp_path / "merged")).model
    finally:
        source.rename(run.home / "source")
    assert_final(net.eval(), run)
