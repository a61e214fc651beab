"""What a doctor makes of what it finds, without a cluster."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.cli.cluster_display import show_diagnosis
from rayfed_lora.cli.console import PlainConsole
from rayfed_lora.diagnosis.dashboard_check import judge_dashboard
from rayfed_lora.diagnosis.doctor import doctor, examine
from rayfed_lora.diagnosis.findings import Finding, diagnosis_status
from rayfed_lora.diagnosis.node_report import (
    MISSING,
    PACKAGES,
    Gpu,
    NodeReport,
    cards,
    check_gpus,
    check_nodes,
    check_versions,
    inspect,
    versions,
)
from rayfed_lora.diagnosis.recipe_checks import (
    check_gpu_memory,
    check_recipes,
    failed_probe,
    measured_probe,
    probe,
    shortened,
)
from rayfed_lora.engines.on_ray.placement import Node
from rayfed_lora.recipe.loading import load_recipe
from tests.fakes import Behaviour, FakeFactory, every_round, make_recipe

SAME = {"python": "3.11.7", **dict.fromkeys(PACKAGES, "1.0")}
A, B = NodeReport("a", SAME), NodeReport("b", SAME)
CARD = Gpu("H100", 80_000.0, 79_000.0)


def one(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def ray_node(cpus: float = 4, gpus: float = 0, memory: float = 8e9) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus, "memory": memory}}


def test_equal_versions_are_named_once() -> None:
    found = one(check_versions([A, B]))
    assert found.level == "ok"
    assert "python 3.11.7, ray 1.0, rayfed-lora 1.0, torch 1.0, peft 1.0" in found.text


def test_versions_that_differ_or_are_missing_are_faults_that_name_the_nodes() -> None:
    other = replace(B, versions={**SAME, "torch": "2.0", "peft": MISSING})
    torch, peft = check_versions([A, other, replace(A, node="c")])
    assert (torch.level, torch.subject) == ("fault", "version of torch")
    assert torch.text == "1.0 on a, c; 2.0 on b"
    assert "install the same torch on every node" in torch.fix
    assert peft.text == "1.0 on a, c; missing on b"
    absent = NodeReport("a", {**SAME, "transformers": MISSING})
    assert one(check_versions([absent])).text == "missing on a"


def test_a_node_that_says_nothing_is_a_fault_and_is_not_compared() -> None:
    silent = NodeReport("b", {}, error="no answer in time")
    counted, fault = check_nodes([A, silent])
    assert counted.text == "1 of 2 answered"
    assert (fault.level, fault.subject, fault.text) == ("fault", "node b", "no answer in time")
    assert one(check_versions([A, silent])).level == "ok"
    assert one(check_gpus([A, silent])).text.startswith("none in the cluster")
    assert check_versions([silent]) == []


@pytest.mark.parametrize(
    ("gpus", "torch_gpus", "ray_gpus", "level", "part"),
    [
        ((CARD,), 1, 1.0, "ok", "H100, 79.0 of 80.0 GB free"),
        ((CARD,), 0, 1.0, "fault", "torch can use none of them"),
        ((CARD, CARD), 2, 1.0, "warning", "Ray assigns 1 of 2"),
        ((), 0, 2.0, "warning", "Ray assigns 2, nvidia-smi lists none"),
    ],
)
def test_cards_are_compared_with_what_ray_and_torch_make_of_them(
    gpus, torch_gpus, ray_gpus, level, part
) -> None:
    report = NodeReport("a", SAME, gpus, torch_gpus, ray_gpus)
    found = one(check_gpus([report, B]))
    assert (found.level, found.subject) == (level, "GPUs of a")
    assert part in found.text
    assert bool(found.fix) == (level != "ok")


def test_cards_are_read_from_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVIDIA H100 80GB HBM3, 81559, 81000\nTesla T4, 15360, 15000\n"

    def run(*given: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 0, said)

    monkeypatch.setattr(subprocess, "run", run)
    first, second = cards()
    # 81,559 MiB of 1,048,576 bytes.
    assert (first.name, round(first.total_mb)) == ("NVIDIA H100 80GB HBM3", 85_521)
    assert second.name == "Tesla T4"

    def absent(*given: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", absent)
    assert cards() == ()


def test_this_machine_is_inspected() -> None:
    found = inspect("here", 0.0)
    assert found.versions == versions()
    assert set(found.versions) == {"python", *PACKAGES}
    assert MISSING not in found.versions.values()


def test_recipes_are_fitted_into_the_cluster() -> None:
    recipe = load_recipe("digits-vit")
    found = one(check_recipes([recipe], False, [ray_node()]))
    assert (found.level, found.subject) == ("ok", "recipe digits-vit")
    assert found.text.startswith("4 client actors of 1 CPU fit, about 0.30 GB of memory each")
    # Four actors of 0.3 GB are more than 1 GB.
    tight = one(check_recipes([recipe], False, [ray_node(memory=1e9)]))
    assert tight.level == "warning"
    assert tight.text.endswith("; 4 on one node need more than its 1.0 GB")
    many = load_recipe("digits-vit", {"runtime.client_actors": 9})
    fault = one(check_recipes([many], True, [ray_node()]))
    assert fault.level == "fault"
    assert "cannot hold 9 client actors" in fault.text


def test_data_that_are_not_there_are_a_fault_where_the_recipe_was_asked_for(
    tmp_path: Path,
) -> None:
    recipe = load_recipe("digits-vit", {"data.source": str(tmp_path / "gone.parquet")})
    assert one(check_recipes([recipe], False, [ray_node()])).level == "fault"
    found = one(check_recipes([recipe], True, [ray_node()]))
    assert found.level == "warning"
    assert "there is no such file" in found.text


@pytest.mark.parametrize(
    ("url", "status", "level", "part"),
    [
        ("http://127.0.0.1:8265", 401, "ok", "asks for the token"),
        ("http://10.0.0.1:8265", 403, "ok", "asks for the token"),
        ("http://127.0.0.1:8265", 200, "warning", "every user of the head node can run code"),
        ("http://10.0.0.1:8265", 200, "fault", "anyone who reaches that port can run code"),
        ("http://10.0.0.1:8265", None, "warning", "none answers at http://10.0.0.1:8265"),
    ],
)
def test_a_dashboard_without_a_token_is_an_open_door(url, status, level, part) -> None:
    found = judge_dashboard(url, status)
    assert found.level == level
    assert part in found.text


def test_the_probe_is_one_round_at_the_heating_rank_after_one_of_the_full_model() -> None:
    recipe = make_recipe(clients__local_epochs=3, storage__path="/out")
    short = shortened(recipe, 2)
    assert short.annealing.total_rounds == 2
    assert short.annealing.heating.rank == recipe.annealing.heating.rank
    assert (short.clients.per_round, short.runtime.cohort_size, short.clients.steps) == (2, 2, 2)
    assert short.storage.path is None
    full = shortened(make_recipe(annealing__mode="full"), 1)
    assert full.annealing.total_rounds == 1


def test_a_probe_trains_whom_it_draws_whatever_clients_do_otherwise() -> None:
    recipe = make_recipe(
        clients__availability=0.5,
        clients__speed={"median": 1.0},
        clients__deadline_s=1.0,
        clients__over_select=2.0,
        evaluation__client_fraction=0.2,
        evaluation__clients_every=2,
    )
    short = shortened(recipe, 2)
    assert short.clients.availability == make_recipe().clients.availability
    assert (short.clients.deadline_s, short.clients.over_select) == (None, 1.0)
    assert (short.evaluation.client_fraction, short.evaluation.clients_every) == (0.0, None)


def test_a_probe_is_told_to_nobody():
    asked = make_recipe(
        tracking__tensorboard=True, tracking__wandb="project", tracking__mlflow="experiment"
    )
    assert shortened(asked, 2).tracking == make_recipe().tracking


def test_a_probe_runs_the_recipe_and_says_why_it_cannot() -> None:
    short = shortened(make_recipe(), 2)
    done = probe(short, 0.0, FakeFactory())
    assert (done.level, done.text) == ("skipped", "the worker of the share has no GPU")
    behaviour = Behaviour(raising=every_round(*range(6)))
    failed = probe(short, 0.0, FakeFactory(behaviour))
    assert (failed.level, failed.subject) == ("fault", "GPU memory of fake")
    assert failed.text.startswith("the probe on 0 GPU failed: ValueError")


def test_a_probe_is_judged_by_its_share_of_the_card() -> None:
    found = measured_probe("r", 0.25, 4_200.0, 80_000.0)
    assert found.level == "ok"
    assert "took 4.20 GB of the 20.00 GB of 0.25 GPU" in found.text
    failed = failed_probe("r", 0.25, "OutOfMemoryError: CUDA out of memory")
    assert failed.level == "fault"
    assert "raise runtime.gpus_per_actor" in failed.fix


def test_without_a_gpu_nothing_is_probed_and_that_is_said() -> None:
    found = one(check_gpu_memory([make_recipe()], [Node(4, 0)]))
    assert (found.level, found.text) == ("skipped", "no GPU in the cluster, nothing was probed")
    on_cpu = one(check_gpu_memory([make_recipe()], [Node(4, 1)]))
    assert on_cpu.text == "its actors use no GPU"


def test_findings_are_shown_with_how_to_fix_them_and_counted() -> None:
    findings = [
        Finding("ok", "Ray", "2.0, 1 nodes"),
        Finding("fault", "ports", "[closed]", "open them"),
        Finding("skipped", "GPU memory", "no GPU"),
    ]
    console = PlainConsole(width=100)
    with console.capture() as capture:
        show_diagnosis(console, findings)
    assert capture.get().splitlines() == [
        "ok      Ray: 2.0, 1 nodes",
        "fault   ports: [closed]",
        "        fix: open them",
        "skipped GPU memory: no GPU",
        "1 faults, 0 warnings, 1 skipped",
    ]
    assert diagnosis_status(findings) == 1
    assert diagnosis_status([findings[0], findings[2]]) == 0


def test_a_dashboard_that_nobody_answers_at_is_a_fault() -> None:
    found = examine("http://127.0.0.1:1", [], storage=None, probe=False, show=print)
    assert isinstance(found, list)
    assert one(found).level == "fault"
    assert "open the tunnel" in one(found).fix


def test_a_cluster_that_nobody_answers_at_is_a_fault() -> None:
    found = one(doctor("127.0.0.1:1"))
    assert (found.level, found.subject) == ("fault", "Ray")
    assert "no Ray cluster at 127.0.0.1:1" in found.text
    assert "ray start --head" in found.fix
