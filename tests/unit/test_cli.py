"""The commands as a user meets them: their output, their messages and their exit status."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayfed_lora.cli import commands as cli
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.cli.run_display import watching
from rayfed_lora.federation.records import RoundRecord
from rayfed_lora.recipe.loading import load_recipe, shipped_names, shipped_text
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.status import Status
from rayfed_lora.types import Proposal

HEAVY = ("ray", "torch", "transformers", "pandas", "peft", "sklearn")
TINY = """\
name: tiny
data: {source: digits, max_examples: 60, partition: {clients: 4}}
model:
  config: {architecture: vit, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
    intermediate_size: 24, patch_size: 4}
annealing:
  initiating: {rounds: 1}
  heating: {rounds: 1, rank: 2}
  cooling: {rounds: 1, rank: 1}
  holding: {rounds: 0}
clients: {per_round: 2, local_steps: 1, batch_size: 4}
runtime: {executor: local, device: cpu}
"""
# What a plan shows of TINY before it reads data and model.
STAGES = """\
tiny: sa-fedlora, 3 rounds
  initiating: 1 round, full model
  heating: 1 round, rank 2
  cooling: 1 round, rank 1
"""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, on a wide terminal, without a cluster."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe file outside the working folder."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run the command line in this process."""

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr("sys.argv", ["rayfed-lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(left.value.code or 0), captured.out, captured.err)

    yield run


def fresh(arguments: Sequence[str | Path], loaded: Sequence[str] = ()) -> Outcome:
    """Run the command line in a new process; its last line says which of `loaded` it imported."""
    program = (
        "import atexit, json, sys\n"
        f"names = {list(loaded)!r}\n"
        "atexit.register(lambda: print(json.dumps([n for n in names if n in sys.modules])))\n"
        "from rayfed_lora.cli.commands import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(outcome: Outcome, *parts: str, shown: str = "", begun: bool = False) -> None:
    """Check for status 2 and one message without a traceback, with all of the parts in it.

    `shown` was printed before; with `begun` the run had said where it is, and that it starts.
    """
    assert outcome.status == 2
    assert outcome.out == shown or (begun and "loading data and model" in outcome.out)
    assert outcome.err.startswith("rayfed-lora: ")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    # The quickest of three: the machine may be busy with others.
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        outcome = fresh(["--help"], loaded=HEAVY)
        spent.append(time.perf_counter() - began)
    assert outcome.status == 0
    assert outcome.out.splitlines()[-1] == "[]"
    for name in ("run", "compare", "plan", "report", "export", "recipes", "submit", "doctor"):
        assert name in outcome.out
    assert min(spent) < 2.0


def test_listing_recipes_imports_nothing_heavy() -> None:
    outcome = fresh(["recipes"], loaded=HEAVY)
    assert (outcome.status, outcome.out.splitlines()[-1]) == (0, "[]")


def test_a_faulty_recipe_is_refused_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text(TINY.replace("per_round: 2", "per_round: many"))
    outcome = fresh(["run", faulty], loaded=HEAVY)
    assert (outcome.status, outcome.out) == (2, "[]\n")


def test_without_a_command_the_help_is_shown(command: Command) -> None:
    outcome = command()
    assert "Usage" in outcome.out + outcome.err


def test_recipes_lists_every_shipped_recipe_with_its_first_line(command: Command) -> None:
    lines = command("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_names()
    assert {"digits-vit", "trec-minilm"} <= set(shipped_names())
    for line in lines:
        name, about = line.split(maxsplit=1)
        assert about in shipped_text(name).splitlines()[0]


def test_recipes_with_a_name_prints_a_file_that_runs_as_the_name_does(
    command: Command, tmp_path: Path
) -> None:
    outcome = command("recipes", "digits-vit")
    path = tmp_path / "copy.yaml"
    path.write_text(outcome.out)
    assert load_recipe(path) == load_recipe("digits-vit")


def test_an_unknown_recipe_is_refused_with_the_nearest_name(command: Command) -> None:
    assert_refused(command("recipes", "digits-vti"), "did you mean 'digits-vit'?")
    assert_refused(command("run", "digits-vti"), "did you mean 'digits-vit'?")


@pytest.mark.parametrize("name", shipped_names())
def test_every_shipped_recipe_fits_the_printed_schema_and_loads(
    name: str, command: Command
) -> None:
    schema = json.loads(command("recipes", "--schema").out)
    jsonschema.Draft202012Validator.check_schema(schema)
    document = YAML(typ="safe", pure=True).load(shipped_text(name))
    jsonschema.Draft202012Validator(schema).validate(document)
    assert load_recipe(name).name == name


@pytest.mark.parametrize(
    "fault", ["cleints: {}", "seed: -1", "method: fedvag", "data: {partition: {kind: even}}"]
)
def test_the_schema_refuses_what_the_loader_refuses(fault: str, command: Command) -> None:
    schema = json.loads(command("recipes", "--schema").out)
    document = YAML(typ="safe", pure=True).load(f"model: {{}}\n{fault}")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(document)


def test_all_faults_of_a_recipe_are_one_message_and_nothing_is_written(
    command: Command, tmp_path: Path, elsewhere: Path
) -> None:
    faulty = tmp_path / "faulty.yaml"
    text = TINY.replace("clients: 4", "clients: 12").replace("rank: 1", "rank: -1")
    faulty.write_text(text.replace("per_round: 2", "per_rond: 2") + "seed: soon\n")
    outcome = command("run", faulty, "--out", "out")
    assert_refused(
        outcome,
        "3 faults",
        "did you mean 'clients.per_round'?",
        "annealing.cooling.rank",
        "seed",
    )
    assert list(elsewhere.iterdir()) == []


def test_a_misspelt_key_is_not_blamed_for_its_default_too(command: Command, tmp_path: Path) -> None:
    # The default of 10 clients a round does not go with 4 clients, but nobody asked for it.
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text(TINY.replace("per_round: 2", "per_rond: 2"))
    assert_refused(command("run", faulty), "1 fault ", "did you mean 'clients.per_round'?")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a: [1", "expected YAML"), ("- 1", "expected a mapping"), ("", "expected a mapping")],
)
def test_a_file_that_is_no_recipe_is_refused(
    text: str, reason: str, command: Command, tmp_path: Path
) -> None:
    path = tmp_path / "strange.yaml"
    path.write_text(text)
    assert_refused(command("plan", path), str(path), reason)


def test_a_misspelt_method_is_refused_with_the_nearest(command: Command, recipe: Path) -> None:
    outcome = command("run", recipe, "--set", "method=fedvag")
    assert_refused(outcome, "method", "did you mean 'fedavg'?")


SET_FORMS = {
    "one option a value": ["--set", "seed=7", "--set", "clients.optimizer.lr=1e-3"],
    "one option for all": ["--set", "seed=7", "clients.optimizer.lr=1e-3"],
    "with an equals sign": ["--set=seed=7", "--set=clients.optimizer.lr=1e-3"],
    "mixed": ["--set", "seed=1", "clients.optimizer.lr=1e-3", "--set", "seed=7"],
}


@pytest.mark.parametrize("form", SET_FORMS)
@pytest.mark.parametrize("before", [False, True], ids=["after the recipe", "before it"])
def test_values_can_be_set_in_every_usual_form(
    form: str, before: bool, command: Command, recipe: Path
) -> None:
    given = SET_FORMS[form]
    order = [*given, recipe] if before else [recipe, *given]
    outcome = command("run", *order, "--out", "out")
    assert (outcome.status, outcome.err) == (0, "")
    written = load_recipe(Path("out/recipe.yaml"))
    assert (written.seed, written.clients.optimizer.lr) == (7, 0.001)


@pytest.mark.parametrize("text", ["seed", "=7", "a..b=1", "seed=[1"])
def test_a_malformed_set_is_refused(text: str, command: Command, recipe: Path) -> None:
    assert_refused(command("plan", recipe, "--set", text), "--set")


def test_an_unknown_key_in_set_is_refused_with_the_nearest(command: Command, recipe: Path) -> None:
    outcome = command("plan", recipe, "--set", "clients.perround=3")
    assert_refused(outcome, "did you mean 'clients.per_round'?")


def test_a_run_prints_a_line_a_round_and_its_summary_where_there_is_no_terminal(
    command: Command, recipe: Path
) -> None:
    outcome = command("run", recipe, "--out", "out")
    assert (outcome.status, outcome.err) == (0, "")
    assert "\x1b" not in outcome.out
    rounds = [line for line in outcome.out.splitlines() if line.startswith("round ")]
    assert [line.split()[1:4] for line in rounds] == [
        ["1/3", "initiating", "full"],
        ["2/3", "heating", "rank"],
        ["3/3", "cooling", "rank"],
    ]
    summary = json.loads(Path("out/summary.json").read_text())
    assert f"{summary['final']['eval_accuracy']:.4f}" in outcome.out
    assert f"{100 * summary['communication']['reduction_vs_fedavg']:.2f} %" in outcome.out
    assert "run folder: out" in outcome.out


def test_without_out_a_run_gets_a_folder_of_its_own(command: Command, recipe: Path) -> None:
    assert command("run", recipe).status == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("tiny-")
    assert (folder / "summary.json").is_file()


def test_the_recipe_may_name_the_run_folder(command: Command, recipe: Path) -> None:
    assert command("run", recipe, "--set", "storage.path=mine").status == 0
    assert (Path("mine") / "summary.json").is_file()


def test_a_second_run_into_a_folder_is_refused_and_changes_nothing(
    command: Command, recipe: Path, elsewhere: Path
) -> None:
    assert command("run", recipe, "--out", "out").status == 0
    before = files(elsewhere)
    assert_refused(command("run", recipe, "--out", "out"), "out", "--resume")
    assert files(elsewhere) == before


def test_a_folder_with_other_files_is_refused(
    command: Command, recipe: Path, elsewhere: Path
) -> None:
    (elsewhere / "notes.txt").write_text("mine")
    assert_refused(command("run", recipe, "--out", elsewhere), "other files")
    assert files(elsewhere) == {"notes.txt": b"mine"}


def test_a_finished_run_is_shown_again_by_resume_and_by_report(
    command: Command, recipe: Path
) -> None:
    command("run", recipe, "--out", "out")
    before = Path("out/summary.json").read_bytes()
    outcome = command("run", recipe, "--out", "out", "--resume")
    assert (outcome.status, "run folder: out" in outcome.out) == (0, True)
    assert Path("out/summary.json").read_bytes() == before
    assert command("report", "out", "--out", "page.html").out == "report: page.html\n"
    assert "<h1>tiny</h1>" in Path("page.html").read_text()
    refused = command("report", "nowhere")
    assert (refused.status, "nowhere: expected the folder of a run" in refused.err) == (2, True)


def test_resuming_another_recipe_is_refused_with_the_keys_that_differ(
    command: Command, recipe: Path
) -> None:
    command("run", recipe, "--out", "out")
    outcome = command("run", recipe, "--out", "out", "--resume", "--set", "seed=9")
    assert_refused(outcome, "another recipe", "seed")


def test_resume_needs_the_folder_of_the_run(command: Command, recipe: Path) -> None:
    outcome = command("run", recipe, "--resume")
    assert outcome.status == 2
    assert "give --out" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("below", ["", "sub"], ids=["the folder itself", "its parent"])
def test_a_file_in_the_way_of_the_run_folder_is_refused(
    below: str, command: Command, recipe: Path, elsewhere: Path
) -> None:
    (elsewhere / "taken").write_text("mine")
    outcome = command("run", recipe, "--out", Path("taken", below))
    assert_refused(outcome, "taken")
    assert files(elsewhere) == {"taken": b"mine"}


def test_a_scheme_that_nothing_opens_is_refused(command: Command, recipe: Path) -> None:
    assert_refused(command("run", recipe, "--out", "s4://bucket/run"), "s4://bucket/run")


@pytest.mark.parametrize("name", ["absent.csv", "broken.parquet"])
def test_a_data_file_that_cannot_be_read_is_refused_by_name(
    name: str, command: Command, recipe: Path, elsewhere: Path
) -> None:
    (elsewhere / "broken.parquet").write_bytes(b"PAR1 but no more")
    source = str(elsewhere / name)
    for verb, shown in (("plan", STAGES), ("run", "")):
        outcome = command(verb, recipe, "--set", f"data.source={source}")
        assert_refused(outcome, source, shown=shown, begun=verb == "run")


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("adapter.target_modules=[qproj]", ["matches nothing", "attention.q_proj"]),
        ("annealing.heating.rank=17", ["at most 16", "got 17"]),
        ("model.config.hidden_size=wide", ["model.", "hidden_size"]),
        ("model.config.hidden_act=nosuch", ["model.config", "nosuch"]),
        ("model.config.num_labels=3", ["num_labels", "expected 10"]),
        ("model.config.image_size=16", ["1 x 16 x 16", "1 x 8 x 8"]),
        ("model.config.architecture=vitt", ["vitt"]),
        ("model.source=package:no_such_package", ["no_such_package"]),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    setting: str, parts: list[str], command: Command, recipe: Path
) -> None:
    stages = STAGES.replace("rank 2", "rank 17") if "rank=17" in setting else STAGES
    for verb, shown in (("plan", stages), ("run", "")):
        outcome = command(verb, recipe, "--set", setting)
        assert_refused(outcome, *parts, shown=shown, begun=verb == "run")


def test_a_refused_run_leaves_its_folder_free_for_a_mended_recipe(
    command: Command, recipe: Path
) -> None:
    refused = command("run", recipe, "--out", "out", "--set", "annealing.heating.rank=17")
    assert refused.status == 2
    assert command("run", recipe, "--out", "out").status == 0


def test_detaching_needs_a_cluster(command: Command, recipe: Path) -> None:
    assert_refused(command("run", recipe, "--detach"), "--address")


def test_the_plan_shows_every_round_and_the_bill_without_ray(recipe: Path, elsewhere: Path) -> None:
    outcome = fresh(["plan", recipe], loaded=["ray"])
    assert (outcome.status, outcome.err) == (0, "")
    *shown, imported = outcome.out.splitlines()
    assert imported == "[]"
    row = re.compile(r"\W*(\d+)\W+(initiating|heating|cooling|holding)\W+(full|\d+)\b")
    rows = [found.groups() for found in map(row.match, shown) if found]
    assert rows == [("1", "initiating", "full"), ("2", "heating", "2"), ("3", "cooling", "1")]
    assert any("reduction against FedAvg" in line for line in shown)
    assert list(elsewhere.iterdir()) == []


def test_the_stages_of_a_plan_are_shown_before_torch_is_imported(recipe: Path) -> None:
    without = (
        "import sys; sys.modules['torch'] = None; import rayfed_lora.cli.commands as c; c.main()"
    )
    command = [sys.executable, "-c", without, "plan", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "import of torch halted" in done.stderr
    assert done.stdout == STAGES, done.stderr


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A recipe in which BART rejects client 1: some of its texts end twice, the others once."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, "why": 3, "how": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>"
    )
    fast.save_pretrained(str(tmp_path / "tokenizer"))
    ends = {
        (client, i): "</s></s>" if client and i % 2 else "</s>"
        for client in range(2)
        for i in range(10)
    }
    rows = [
        {"text": f"how why {ends[client, i]}", "label": f"kind {i % 2}", "who": f"{client}"}
        for client in range(2)
        for i in range(10)
    ]
    table = tmp_path / "questions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "texts.yaml"
    path.write_text(
        f"""\
name: texts
data:
  source: {table}
  partition: {{kind: column, column: who}}
model:
  task: text-classification
  tokenizer: {tmp_path / "tokenizer"}
  config: {{architecture: bart, d_model: 16, encoder_layers: 1, decoder_layers: 1,
    encoder_attention_heads: 2, decoder_attention_heads: 2, encoder_ffn_dim: 24,
    decoder_ffn_dim: 24, max_position_embeddings: 16}}
annealing:
  initiating: {{rounds: 0}}
  heating: {{rounds: 2, rank: 2}}
  cooling: {{rounds: 0, rank: 1}}
  holding: {{rounds: 0}}
clients: {{per_round: 2, local_steps: 1, batch_size: 8}}
runtime: {{executor: local, device: cpu}}
"""
    )
    return path


def assert_names_the_client(outcome: Outcome) -> None:
    assert outcome.status == 1
    assert outcome.err.startswith("rayfed-lora: client 1 failed in round 1:\n")
    # The client's own traceback, ending in what torch says, and once only.
    assert outcome.err.count("Traceback (most recent call last)") == 1
    *_, last, following = outcome.err.splitlines()
    assert "Error: " in last
    assert following == "to resume: rayfed-lora run out --resume"


def test_a_client_that_raises_ends_the_run_with_its_name_round_and_traceback(
    command: Command, texts: Path
) -> None:
    assert_names_the_client(command("run", texts, "--out", "out"))


@pytest.mark.e2e
@pytest.mark.ray
def test_on_ray_a_client_that_raises_gives_the_same_message_and_no_noise(texts: Path) -> None:
    sets = ["--set", "runtime.executor=ray", "runtime.client_actors=1"]
    outcome = fresh(["run", texts, "--out", "out", *sets])
    assert_names_the_client(outcome)
    for noise in ("ray::", "RayTaskError", "pid=", "raylet"):
        assert noise not in outcome.err + outcome.out


# A command that is sent SIGINT at the moment when it begins to import torch.
INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *rest):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
# Shells start what runs in the background with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from rayfed_lora.cli.commands import main
main()
"""


def test_an_interrupt_before_the_run_has_begun_is_no_traceback(recipe: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "plan", str(recipe)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 130
    assert "Traceback" not in ended.stderr


def record(**values: Any) -> RoundRecord:
    known: dict[str, Any] = {
        "round": 1,
        "stage": "cooling",
        "rank": 2.5,
        "ranks": {"q": 2, "v": 3},
        "trainable_params": 10,
        "proximal_weight": 0.0,
        "clients": 4,
        "failed_clients": 1,
        "train_loss": 1.25,
        "evaluation": {"accuracy": 0.5, "loss": 1.0, "macro_f1": 0.5},
        "validation_accuracy": None,
        "validation_loss": None,
        "aggregation_error": None,
        "params_up": 10,
        "params_down": 10,
        "bytes_up": 1_000_000,
        "bytes_down": 500_000,
        "bytes_base": 0,
        "learning_rate": 0.1,
        "proposal": Proposal(2, "accepted"),
        "seconds": 2.0,
    }
    return RoundRecord(**{**known, **values})


STATUSES = (
    Status(rounds=3),
    Status(phase="training", rounds=3, running=1, stage="initiating", clients=4),
    Status(
        phase="training",
        rounds_done=2,
        rounds=3,
        running=3,
        stage="cooling",
        rank=2,
        clients_done=1,
        clients=4,
        updates=9,
        training_since=1.0,
        bytes_total=1_500_000,
        records=(record(),),
        notes=("client 7 failed: loss is [nan]",),
    ),
    Status(phase="exporting", rounds_done=3, rounds=3),
    Status(phase="done", rounds_done=3, rounds=3),
)
# 1.0 MB up and 0.5 MB down; 4 clients in 2 seconds.
ROUND_LINE = (
    "round 2/3  cooling    rank 2.5   train loss 1.250  test accuracy 0.500  test loss 1.000"
    "  sent in round   1.50 MB    2.0 clients/s  0:02  accepted  1 failed"
)


@pytest.mark.parametrize("terminal", [False, True], ids=["plain", "live"])
def test_a_watched_run_keeps_a_line_for_each_round_and_warning(terminal: bool) -> None:
    screen = io.StringIO()
    console = PlainConsole(file=screen, force_terminal=terminal, width=160, color_system=None)
    with watching(console) as watch:
        for status in STATUSES:
            watch(status)
    shown = screen.getvalue()
    assert ROUND_LINE in shown
    assert "warning: client 7 failed: loss is [nan]" in shown
    assert ("\x1b" in shown) == terminal


def test_without_a_terminal_each_phase_is_said_once() -> None:
    screen = io.StringIO()
    with watching(PlainConsole(file=screen, width=160)) as watch:
        for status in (*STATUSES[:2], STATUSES[1], *STATUSES[2:]):
            watch(status)
    lines = screen.getvalue().splitlines()
    assert [lines.count(f"0:00 {phase}") for phase in ("starting", "training", "exporting")] == [
        *(1, 1, 1)
    ]


def test_the_live_display_survives_a_whole_run(recipe: Path) -> None:
    from rayfed_lora.launching import launch

    screen = io.StringIO()
    loaded: Recipe = load_recipe(recipe)
    with watching(PlainConsole(file=screen, force_terminal=True, width=120)) as watch:
        launch.run(loaded, "out", watch=watch)
    assert [f"{i}/3" in screen.getvalue() for i in (1, 2, 3)] == [True] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fast"], "expected one of allocation_and_rule"),
        (["quick", "--recipe", "digits-cnn"], "a shipped recipe"),
        (["quick", "--samples", "2"], "a grid runs each of its combinations once"),
        (["quick", "--scheduler", "hyperband"], "'asha', 'pbt', 'median' or 'none'"),
        (["quick", "--objectives", "accuracy:max"], "expected metrics of eval_accuracy"),
        (["quick", "--objectives", "eval_accuracy:most"], "'max' or 'min'"),
        (["quick", "--max-concurrent", "0"], "expected at least 1, got 0"),
        (["heating_cooling", "--scheduler", "pbt", "--max-concurrent", "2"], "take turns"),
        (["quick", "--set", "annealing.heat=1"], "unknown key"),
    ],
)
def test_a_faulty_search_is_refused(arguments: list[str], message: str, command: Command) -> None:
    assert_refused(command("tune", "--recipe", "digits-vit", *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objectives", "eval_accuracy"], "expected metric:max or metric:min"),
        (["--resume"], "give --out, the folder of the search"),
    ],
)
def test_malformed_options_of_a_search_are_refused(
    arguments: list[str], message: str, command: Command
) -> None:
    outcome = command("tune", "quick", "--recipe", "digits-vit", *arguments)
    assert outcome.status == 2 and message in " ".join(outcome.err.split())
