"""Whole runs on a local Ray: lost workers, GPU shares, the driver actor, what stays in memory."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from rayfed_lora.data.examples import Examples
from rayfed_lora.errors import InterruptedRunError, ResourceError, RunError, RunFolderError
from rayfed_lora.launching import launch
from rayfed_lora.launching.drivers import follow, start_server, status_poll, wait_for_handover
from rayfed_lora.recipe.recipe import Recipe
from rayfed_lora.runs.claiming import claim, claimed
from rayfed_lora.runs.session import simulate
from rayfed_lora.runs.status import Status, StatusBoard
from rayfed_lora.storage import RunFolder
from rayfed_lora.tasks.messages import Initial, Train
from rayfed_lora.types import AdapterState, Base, GlobalModel, LocalPlan
from tests.fakes import Behaviour, FakeFactory, local_engine, make_recipe

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def on_ray(**overrides: Any) -> Recipe:
    return make_recipe(**{"runtime__executor": "ray", "runtime__cohort_size": 1, **overrides})


def run(
    recipe: Recipe, location: Path, factory: FakeFactory, board: StatusBoard | None = None
) -> tuple[dict[str, Any], StatusBoard]:
    from rayfed_lora.engines.on_ray.engine import RayEngine

    board = board or StatusBoard(recipe.annealing.total_rounds)
    engine = RayEngine(recipe, factory, board.note)
    folder = RunFolder(location)
    return simulate(recipe, engine, folder, board, lambda: False, resume=False), board


def expected_summary(location: Path, **overrides: Any) -> dict[str, Any]:
    """Return the summary of the same recipe, undisturbed and without Ray."""
    recipe = make_recipe(**overrides)
    board = StatusBoard(recipe.annealing.total_rounds)
    folder = RunFolder(location)
    return simulate(recipe, local_engine(recipe), folder, board, lambda: False, resume=False)


def table(location: Path, name: str) -> pd.DataFrame:
    content = RunFolder(location).read(f"{name}.parquet")
    return pd.read_parquet(BytesIO(content)).drop(columns="seconds")


def assert_same_result(summary: dict[str, Any], location: Path, expected: Path) -> None:
    wanted = json.loads((expected / "summary.json").read_text())
    for key in ("adapter_sha256", "communication", "final", "best"):
        assert summary[key] == wanted[key]
    # What was lost on the way is told, and changes nothing else.
    pd.testing.assert_frame_equal(
        table(location, "rounds").drop(columns="retried_blocks"),
        table(expected, "rounds").drop(columns="retried_blocks"),
        check_exact=True,
    )


# 64 x 64 images make a workload that lies in Ray's shared memory, as real ones do.
@pytest.mark.parametrize("side", [2, 64], ids=["small workload", "workload in shared memory"])
# The slower ones are kept for `make e2e`.
@pytest.mark.parametrize("actors", [1, pytest.param(2, marks=pytest.mark.e2e)])
def test_a_client_actor_killed_in_a_block_is_told_and_the_result_is_the_same(
    actors, side, tmp_path
):
    expected_summary(tmp_path / "local", clients__per_round=1.0)
    marker = tmp_path / "marker"
    marker.touch()
    # With two actors the rounds take so long that the killed one comes back before the end.
    sleep_s = dict.fromkeys(range(6), 0.5 if actors == 2 else 0.0)
    behaviour = Behaviour(dying=frozenset({(3, 2)}), marker=str(marker), sleep_s=sleep_s)
    recipe = on_ray(clients__per_round=1.0, runtime__client_actors=actors)
    summary, board = run(recipe, tmp_path / "run", FakeFactory(behaviour, side))
    assert not marker.exists()
    assert any("lost in round 3 block 3" in note for note in board.status().notes)
    assert summary["retried_blocks"] == 1
    assert table(tmp_path / "run", "rounds")["retried_blocks"].tolist() == [0, 0, 1, 0, 0, 0]
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


@pytest.mark.e2e
@pytest.mark.parametrize("place", ["workload", "trainer"])
def test_a_client_actor_lost_while_it_starts_is_started_again(place, tmp_path):
    expected_summary(tmp_path / "local")
    marker = tmp_path / "marker"
    marker.touch()
    factory = FakeFactory(Behaviour(marker=str(marker)), 64, dying_in=place)
    summary, board = run(on_ray(runtime__client_actors=2), tmp_path / "run", factory)
    assert not marker.exists()
    (note,) = (note for note in board.status().notes if "lost" in note)
    assert "it is started again" in note
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


@pytest.mark.e2e
def test_a_client_actor_that_is_lost_in_each_of_its_starts_ends_the_run(tmp_path):
    factory = FakeFactory(dying_in="trainer")
    with pytest.raises(RunError, match="4 times one after another"):
        run(on_ray(runtime__client_actors=1), tmp_path / "run", factory)


@pytest.mark.e2e
def test_an_actor_of_two_trainers_is_lost_with_both_of_its_blocks_and_the_result_is_the_same(
    tmp_path,
):
    expected_summary(tmp_path / "local", clients__per_round=1.0)
    marker = tmp_path / "marker"
    marker.touch()
    # Client 3 is the last one of a pair that is trained at once; the other one is not done by then.
    sleep_s = {client: 0.5 if client == 2 else 0.1 for client in range(6)}
    behaviour = Behaviour(dying=frozenset({(3, 2)}), marker=str(marker), sleep_s=sleep_s)
    recipe = on_ray(clients__per_round=1.0, runtime__client_actors=1, runtime__cpus_per_actor=2.0)
    summary, board = run(recipe, tmp_path / "run", FakeFactory(behaviour))
    assert not marker.exists()
    (note,) = (note for note in board.status().notes if "lost" in note)
    assert re.search(r"lost in round 3 block 2 and round 3 block 3 and its work is run again", note)
    assert summary["retried_blocks"] == 2
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


@pytest.mark.e2e
def test_a_block_that_takes_too_long_is_run_again_on_a_new_process(tmp_path):
    expected_summary(tmp_path / "local")
    marker = tmp_path / "marker"
    marker.touch()
    behaviour = Behaviour(stuck=frozenset((client, 2) for client in range(6)), marker=str(marker))
    recipe = on_ray(runtime__block_timeout_s=3.0)
    summary, board = run(recipe, tmp_path / "run", FakeFactory(behaviour))
    (note,) = (note for note in board.status().notes if "lost" in note)
    assert re.search(r"round 3 block \d took longer than 3 s \(runtime.block_timeout_s\)", note)
    assert summary["retried_blocks"] >= 1
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


def test_the_message_of_each_state_is_made_once(tmp_path, monkeypatch):
    from rayfed_lora.engines.on_ray import engine, messages

    expected_summary(tmp_path / "local")
    states = []

    def noting(value: Any) -> Any:
        if isinstance(value, AdapterState):
            states.append(value.version)
        return messages.sent(value)

    monkeypatch.setattr(engine, "sent", noting)
    summary, _ = run(on_ray(), tmp_path / "run", FakeFactory())
    # An empty one that goes with the first question, the first state, and what each of six rounds
    # has come to; round 1 starts from fresh factors, and ranks change before two rounds. That of
    # the other rounds was put when it was tested.
    assert len(states) == 1 + 1 + 6 + 1 + 2
    assert len(set(states)) == len(states)
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


def test_parts_of_a_join_that_are_lost_are_computed_again(tmp_path, monkeypatch):
    from rayfed_lora.engines.on_ray.calls import PartsLostError
    from rayfed_lora.engines.on_ray.engine import RayEngine
    from rayfed_lora.engines.on_ray.messages import unpacked

    expected_summary(tmp_path / "local", clients__per_round=1.0)
    monkeypatch.setattr("rayfed_lora.tasks.engine._MOST_ALONE", 3)
    fetched, asked = RayEngine._fetched, []

    def losing(self: RayEngine, task: Any, parts: list[Any]) -> Any:
        if unpacked(task).kind == "train":
            asked.append(len(parts))
            if len(asked) == 2:
                raise PartsLostError("the node is gone")
        return fetched(self, task, parts)

    monkeypatch.setattr(RayEngine, "_fetched", losing)
    recipe = on_ray(clients__per_round=1.0)
    summary, board = run(recipe, tmp_path / "run", FakeFactory())
    blocks = asked[0]
    assert blocks == 6
    assert asked == [blocks] * 7
    assert any("lost and are computed again: the node is gone" in n for n in board.status().notes)
    assert summary["retried_blocks"] == blocks
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


def test_a_pool_ends_only_the_call_whose_parts_were_lost():
    import ray
    from ray.exceptions import ObjectLostError

    from rayfed_lora.engines.on_ray.calls import PartsLostError, Work
    from rayfed_lora.engines.on_ray.pool import ActorPool, Revival

    @ray.remote(num_cpus=0)
    class Joining:
        def join(self, good: bool, halvings: int) -> str:
            if good:
                return "joined"
            # What a call raises in Ray whose arguments are lost.
            raise ObjectLostError("00" * 28, None, "")

    def joining(good: bool) -> Work:
        return Work("joining", "join", (good,))

    revival = Revival(lambda actor: actor.ready.remote())
    pool = ActorPool([Joining.remote()], revival, print, 10.0)
    lost, whole = pool.submit([joining(False), joining(True)])
    assert pool.result(whole) == "joined"
    with pytest.raises(PartsLostError):
        pool.result(lost)


def test_a_pool_goes_on_with_another_actor_where_one_cannot_come_back():
    import ray

    from rayfed_lora.engines.on_ray.actors import NotOpenError
    from rayfed_lora.engines.on_ray.calls import Work
    from rayfed_lora.engines.on_ray.pool import ActorPool, Revival

    @ray.remote(num_cpus=0)
    class Sometimes:
        def __init__(self, well: bool) -> None:
            self._well = well

        def open(self) -> None:
            if not self._well:
                raise NotOpenError("the node is gone")

        def train(self, halvings: int) -> str:
            self.open()
            return "trained"

    ill, well, notes = Sometimes.remote(False), Sometimes.remote(True), []
    revival = Revival(lambda actor: actor.open.remote(), lambda actor: well)
    pool = ActorPool([ill], revival, notes.append, 10.0)
    (job,) = pool.submit([Work("training", "train")])
    assert pool.result(job) == "trained"
    assert "another one starts where there is room" in notes[-1]


@pytest.mark.e2e
def test_a_pool_does_not_wait_for_ever_for_an_actor_that_keeps_being_refused():
    import ray

    from rayfed_lora.engines.on_ray.actors import NotOpenError
    from rayfed_lora.engines.on_ray.calls import Work
    from rayfed_lora.engines.on_ray.pool import ActorPool, Revival

    @ray.remote(num_cpus=0)
    class Ill:
        def train(self, halvings: int = 0) -> None:
            raise NotOpenError("the node is gone")

    pool = ActorPool([Ill.remote()], Revival(lambda actor: actor.train.remote()), str, 2.0)
    (job,) = pool.submit([Work("training", "train")])
    with pytest.raises(RunError, match="no client actor came back within 2 s after it was lost"):
        pool.result(job)


def test_a_pool_sends_work_to_the_actor_with_the_fewest_calls_and_the_rest_waits():
    import ray

    from rayfed_lora.engines.on_ray.calls import Work
    from rayfed_lora.engines.on_ray.pool import ActorPool, Revival

    @ray.remote(num_cpus=0)
    class Numbered:
        def __init__(self, number: int) -> None:
            self._number = number

        def work(self, halvings: int) -> int:
            return self._number

    actors = [Numbered.remote(0), Numbered.remote(1)]
    pool = ActorPool(actors, Revival(lambda actor: actor.work.remote(0)), print, 10.0, ahead=1)
    jobs = pool.submit([Work("work", "work")] * 5)
    # Two calls each; the fifth waits for whichever is done first.
    assert [job.begun for job in jobs] == [1, 1, 1, 1, 0]
    assert [pool.result(job) for job in jobs][:4] == [0, 1, 0, 1]


def trained(engine: Any) -> list[int]:
    """Train a block of two clients; return which clients were trained."""
    state = AdapterState({}, engine.submit(Initial("adapter")).result())
    plan = LocalPlan(round=1, trainable="adapter", lr=0.1, proximal_weight=0.0)
    model = GlobalModel(state, Base(), "adapter")
    found = engine.submit(Train(model, plan, "factor-average", ((0, 1),))).result()
    return [report.client for report in found.reports]


@pytest.mark.e2e
def test_data_that_is_lost_with_its_node_is_prepared_again():
    import ray
    from ray.exceptions import ObjectLostError

    from rayfed_lora.engines.on_ray.engine import RayEngine

    @ray.remote(num_cpus=0)
    def lost() -> None:
        raise ObjectLostError("00" * 28, None, "")

    notes: list[str] = []
    engine = RayEngine(on_ray(), FakeFactory(), notes.append)
    try:
        engine.open()
        # What is lost of an actor's results is lost for good, and whoever asks for it is told.
        engine._shared = [lost.remote(), lost.remote()]
        actor = engine._pool._workers[0].actor
        os.kill(ray.get(actor.__ray_call__.remote(lambda itself: os.getpid())), signal.SIGKILL)
        assert trained(engine) == [0, 1]
    finally:
        engine.close()
    assert "data and base were lost with their node and are prepared again" in notes


def test_a_detached_run_that_failed_says_why_and_makes_way_for_the_next_one(tmp_path):
    import ray

    recipe = on_ray()
    raising = FakeFactory(Behaviour(raising=frozenset((client, 2) for client in range(6))))
    folder = RunFolder(tmp_path / "run")
    claim(folder, recipe, resume=False)
    server, name = start_server(recipe, folder.location, detached=True, factory=raising)
    status = over(server)
    assert status.phase == "failed"
    assert "was told to raise" in status.notes[-1]
    options = {"detached": True, "resume": True, "factory": FakeFactory()}
    server, again = start_server(recipe, folder.location, **options)
    try:
        assert again == name
        assert (over(server).phase, over(server).rounds_before) == ("done", 2)
    finally:
        ray.kill(server)


def over(server: Any) -> Status:
    """Wait until a detached run is over; return its status."""
    import ray

    deadline = time.monotonic() + 120
    while not (status := ray.get(server.status.remote())).over:
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    return status


@pytest.mark.e2e
def test_notes_of_a_server_that_was_started_again_are_all_seen():
    import ray

    @ray.remote(num_cpus=0, max_concurrency=2)
    class Server:
        def __init__(self) -> None:
            self._boards = [StatusBoard(6), StatusBoard(6)]
            for text in ("first", "second"):
                self._boards[0].note(text)
            self._boards[1].note("third")

        def run(self) -> dict[str, Any]:
            time.sleep(2.0)
            self._boards.pop(0)
            time.sleep(2.0)
            return {}

        def status(self, records_seen: int = 0, notes_seen: int = 0) -> Status:
            return self._boards[0].status(records_seen, notes_seen)

    seen: list[str] = []
    server = Server.remote()
    follow(server, status_poll(server, lambda status: seen.extend(status.notes)), "")
    assert seen == ["first", "second", "third"]


@pytest.mark.e2e
def test_an_actor_is_renewed_with_its_placement_group_where_its_node_is_gone(monkeypatch):
    import ray

    from rayfed_lora.engines.on_ray import crew as crews

    table = crews.placement_group_table
    crew = crews.Crew.reserved(on_ray(runtime__client_actors=2), "renewed")
    try:
        assert crew.wait(60.0)
        first, second = crew.actors
        assert crew.renewed(first) is first
        monkeypatch.setattr(crews, "placement_group_table", lambda _: {"state": "RESCHEDULING"})
        other = crew.renewed(first)
        assert other is not first
        assert crew.actors == [other, second]
        monkeypatch.undo()
        assert crew.wait(60.0)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(first.__ray_ready__.remote(), timeout=60.0)
    finally:
        crew.close()
    ours = [each for each in table().values() if each["name"].startswith("renewed ")]
    assert len(ours) == 3
    assert {each["state"] for each in ours} == {"REMOVED"}


@pytest.mark.e2e
def test_work_that_is_stuck_each_time_ends_the_run_with_its_name(tmp_path):
    stuck = Behaviour(sleep_s=dict.fromkeys(range(6), 600.0))
    recipe = on_ray(runtime__block_timeout_s=1.0)
    with pytest.raises(RunError, match=r"round 1 block \d lost 4 actors .* longer than 1 s"):
        run(recipe, tmp_path / "run", FakeFactory(stuck))


@pytest.mark.e2e
def test_work_that_ends_its_process_is_tried_in_smaller_blocks_and_the_rounds_before_are_kept(
    tmp_path,
):
    # Ray's memory monitor, and the kernel's, end a process without a word that would reach us.
    lethal = Behaviour(dying_always=frozenset({(0, 2)}))
    recipe = on_ray(clients__per_round=1.0, runtime__cohort_size=6)
    board = StatusBoard(recipe.annealing.total_rounds)
    with pytest.raises(RunError, match="round 3 block 0 lost 4 actors"):
        run(recipe, tmp_path / "run", FakeFactory(lethal), board)
    # The second one still had to be tested.
    assert table(tmp_path / "run", "rounds")["round"].tolist() == [0, 1]
    assert sum("in smaller blocks" in note for note in board.status().notes) == 2


@pytest.mark.e2e
def test_when_all_client_actors_are_killed_at_once_the_result_is_the_same(tmp_path):
    expected_summary(tmp_path / "local", clients__per_round=1.0)
    killed: list[int] = []

    def watch(status: Status) -> None:
        if status.rounds_done == 2 and not killed:
            killed.extend(actor_processes())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    recipe = on_ray(clients__per_round=1.0, runtime__client_actors=2)
    board = StatusBoard(recipe.annealing.total_rounds, watch)
    summary, _ = run(recipe, tmp_path / "run", FakeFactory(SLOW), board)
    assert len(killed) == 2
    assert summary["retried_blocks"] >= 1
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


def actor_processes() -> list[int]:
    """Return the processes of our own Ray's client actors, named by what they are or do."""
    ours = psutil.Process().children(recursive=True)
    named = {process.pid: " ".join(process.cmdline()) for process in ours}
    doing = ("ray::ClientActor", "ray::client", "ray::round", "ray::evaluate")
    return [pid for pid, name in named.items() if name.startswith(doing)]


@pytest.mark.e2e
def test_a_client_actor_that_takes_long_to_come_back_is_waited_for(tmp_path):
    # Ray refuses calls while it restarts an actor, after 2 s each: ten seconds are five refusals.
    expected_summary(tmp_path / "local")
    marker = tmp_path / "marker"
    marker.touch()
    behaviour = Behaviour(dying=frozenset((client, 2) for client in range(6)), marker=str(marker))
    summary, board = run(on_ray(), tmp_path / "run", FakeFactory(behaviour, start_s=10.0))
    assert any("client actor was lost" in note for note in board.status().notes)
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


def test_actors_sum_with_one_thread_however_many_cores_they_have():
    import ray
    from threadpoolctl import threadpool_info

    from rayfed_lora.engines.on_ray.engine import RayEngine

    engine = RayEngine(
        on_ray(runtime__cpus_per_actor=4.0, runtime__client_actors=1), FakeFactory(), pytest.fail
    )
    try:
        engine.open()
        actor = engine._pool._workers[0].actor
        pools = ray.get(actor.__ray_call__.remote(lambda itself: threadpool_info()))
    finally:
        engine.close()
    assert {pool["num_threads"] for pool in pools if pool["user_api"] == "blas"} == {1}


@pytest.mark.e2e
def test_an_actor_restarted_while_it_was_idle_is_opened_anew(tmp_path):
    import ray

    from rayfed_lora.engines.on_ray.engine import RayEngine

    notes: list[str] = []
    engine = RayEngine(on_ray(), FakeFactory(), notes.append)
    try:
        engine.open()
        actor = engine._pool._workers[0].actor
        pid = ray.get(actor.__ray_call__.remote(lambda itself: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not answers(actor):
            assert time.monotonic() < deadline
        assert trained(engine) == [0, 1]
    finally:
        engine.close()
    assert len(notes) == 1
    assert "client-actor-00 of fake was restarted while it was idle" in notes[0]


def answers(actor: Any) -> bool:
    """Return whether an actor's process takes calls."""
    import ray
    from ray.exceptions import RayError

    time.sleep(0.2)
    try:
        return bool(ray.get(actor.__ray_call__.remote(lambda itself: True)))
    except RayError:
        return False


def test_two_runs_of_one_name_share_a_cluster(tmp_path):
    from rayfed_lora.engines.on_ray.engine import RayEngine

    recipe = on_ray(runtime__cpus_per_actor=0.5)
    first = RayEngine(recipe, FakeFactory(), note=pytest.fail)
    first.open()
    try:
        summary, _ = run(recipe, tmp_path, FakeFactory())
    finally:
        first.close()
    assert summary["rounds"] == 6


@pytest.mark.e2e
def test_half_gpus_are_shared_and_without_a_card_the_device_is_the_cpu(tmp_path):
    import ray
    import torch

    free: list[tuple[float, float]] = []

    def watch(status: Status) -> None:
        if status.records:
            now = ray.available_resources()
            free.append((now.get("GPU", 0.0), now.get("CPU", 0.0)))

    recipe = on_ray(
        clients__per_round=1.0,
        runtime__client_actors="auto",
        runtime__gpus_per_actor=0.5,
        runtime__device="auto",
    )
    board = StatusBoard(recipe.annealing.total_rounds, watch)
    run(recipe, tmp_path, FakeFactory(), board)
    # Six clients a round, but two GPUs hold four halves: 4 * 0.5 GPU and 4 CPUs are taken.
    assert free == [(0.0, 0.0)] * 6
    device = json.loads((tmp_path / "adapter" / "fake.json").read_text())["device"]
    assert device == ("cuda:0" if torch.cuda.is_available() else "cpu")


def test_more_actors_than_fit_are_refused_at_once_with_the_numbers(tmp_path):
    began = time.perf_counter()
    recipe = on_ray(runtime__client_actors=5, runtime__gpus_per_actor=0.5, runtime__device="auto")
    with pytest.raises(ResourceError) as refused:
        run(recipe, tmp_path, FakeFactory())
    assert time.perf_counter() - began < 10
    assert "cannot hold 5 client actors of 1 CPU and 0.5 GPU each" in str(refused.value)
    assert "it holds 4. Nodes: 4 CPU, 2 GPU" in str(refused.value)


def test_nodes_that_do_not_come_are_waited_for_so_long_and_no_longer(tmp_path):
    recipe = on_ray(runtime__client_actors=50, runtime__scale_up_s=1.0)
    with pytest.raises(ResourceError, match=r"waited 1 s \(runtime.scale_up_s\) for 50 client"):
        run(recipe, tmp_path, FakeFactory())


def test_resources_that_others_hold_are_waited_for_so_long_and_no_longer(tmp_path):
    from ray.util.placement_group import placement_group, remove_placement_group

    taken = placement_group([{"CPU": 3.0}])
    assert taken.wait(30)
    try:
        recipe = on_ray(runtime__client_actors=2, runtime__start_timeout_s=1.0)
        with pytest.raises(
            ResourceError, match=r"waited 1 s .* 2 client actors .* got 1; free beside them: 0 CPU"
        ):
            run(recipe, tmp_path, FakeFactory())
    finally:
        remove_placement_group(taken)


@pytest.mark.e2e
def test_who_waits_does_not_keep_for_ever_what_another_one_waits_for():
    from ray.util.placement_group import placement_group, remove_placement_group

    from rayfed_lora.engines.on_ray.crew import Crew

    # Of 4 CPUs the other one has 2 and wants a third; we want 3.
    has = placement_group([{"CPU": 2.0}])
    assert has.wait(30)
    recipe = on_ray(runtime__client_actors=3, runtime__start_timeout_s=200.0)
    with ThreadPoolExecutor() as pool:
        ours = pool.submit(Crew.reserved, recipe, "ours")
        time.sleep(5.0)
        wants = placement_group([{"CPU": 1.0}])
        assert wants.wait(60)
        assert not ours.done()
        remove_placement_group(has)
        remove_placement_group(wants)
        crew = ours.result(100)
    assert crew.wait(60.0)
    crew.close()


@pytest.mark.e2e
def test_the_object_store_does_not_grow_with_the_rounds(tmp_path):
    import ray
    from ray._private.internal_api import memory_summary

    address = ray.get_runtime_context().gcs_address
    objects: dict[int, int] = {}

    def watch(status: Status) -> None:
        for record in status.records:
            if record.round in (3, 33):
                time.sleep(2.5)  # Ray frees objects once a second
                found = re.search(r", (\d+) objects", memory_summary(address, stats_only=True))
                assert found is not None
                objects[record.round] = int(found.group(1))

    # Rank 3 to 1 by 30 cooling rounds, two folds: the workload, the base and a state or two are
    # held at a time; one object a round that stayed would make 30 more.
    recipe = on_ray(
        annealing__cooling__rounds=30, annealing__cooling__residual="fold", clients__per_round=1.0
    )
    run(recipe, tmp_path, FakeFactory(side=64), StatusBoard(34, watch))
    assert objects[33] <= objects[3] + 3


def mapped_in(address: int) -> str:
    """Return what this process has mapped at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(edge, 16) for edge in line.split()[0].split("-"))
        if low <= address < high:
            return line
    return ""


def test_examples_are_read_where_the_object_store_holds_them() -> None:
    import ray

    def look(examples: Examples) -> tuple[str, ...]:
        arrays = [*examples.inputs.values(), examples.labels]
        return tuple(mapped_in(array.ctypes.data) for array in arrays)

    rows = 2_000
    pixels = np.zeros((rows, 3, 16, 16), np.float32)
    reference = ray.put(Examples.of({"pixel_values": pixels}, np.zeros(rows)))
    for place in ray.get(ray.remote(look).options(num_cpus=0).remote(reference)):
        assert "plasma" in place


@contextmanager
def server_of(recipe: Recipe, location: Path, resume: bool, factory: FakeFactory) -> Iterator[Any]:
    """A driver actor, ended with all that it holds when the test is done with it."""
    import ray

    from rayfed_lora.launching.simulation_server import SimulationServer

    options = {"num_cpus": 0, "max_concurrency": 2, "max_restarts": -1, "max_task_retries": -1}
    remote = ray.remote(SimulationServer).options(**options)
    server = remote.remote(recipe, str(location), resume=resume, factory=factory)
    try:
        yield server
    finally:
        ray.kill(server)


def wait_for(server: Any, rounds: int) -> Status:
    """Poll the server until so many rounds are done."""
    import ray

    deadline = time.monotonic() + 120
    while True:
        status: Status = ray.get(server.status.remote(), timeout=30)
        if status.rounds_done >= rounds:
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.05)


SLOW = Behaviour(sleep_s=dict.fromkeys(range(6), 0.2))


def test_the_server_answers_while_it_runs_and_stops_with_its_rounds_kept(tmp_path):
    import ray

    expected_summary(tmp_path / "local")
    with server_of(on_ray(), tmp_path / "run", False, FakeFactory(SLOW)) as server:
        result = server.run.remote()
        status = wait_for(server, rounds=2)
        assert status.phase == "training"
        assert (status.rounds, status.clients) == (6, 3)
        assert [record.round for record in status.records][:2] == [0, 1]
        news = ray.get(server.status.remote(records_seen=1)).records
        assert [record.round for record in news][:1] == [1]
        ray.get(server.stop.remote())
        with pytest.raises(InterruptedRunError, match=r"stopped with \d of 6 rounds done"):
            ray.get(result)
    assert not (tmp_path / "run" / "summary.json").exists()

    with server_of(on_ray(), tmp_path / "run", True, FakeFactory()) as again:
        summary = ray.get(again.run.remote())
        assert ray.get(again.status.remote()).rounds_before >= 2
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


def test_a_server_that_is_killed_comes_back_and_goes_on_to_the_same_result(tmp_path):
    import ray

    expected_summary(tmp_path / "local")
    # 3 of 4 CPUs: the second session can only start if what the first one reserved was freed.
    recipe = on_ray(name="killed", runtime__cpus_per_actor=3.0, runtime__start_timeout_s=30.0)
    with server_of(recipe, tmp_path / "run", False, FakeFactory(SLOW)) as server:
        result = server.run.remote()
        wait_for(server, rounds=2)
        ray.kill(server, no_restart=False)
        summary = ray.get(result, timeout=180)
        # A round is shown before it is saved: the second one may have to be run again.
        assert ray.get(server.status.remote()).rounds_before >= 1
    assert_same_result(summary, tmp_path / "run", tmp_path / "local")


def test_a_run_is_launched_watched_and_brought_home(tmp_path):
    expected_summary(tmp_path / "local")
    seen: list[Status] = []
    behaviour = Behaviour(sleep_s={0: 0.3})
    result = launch.run(
        on_ray(), str(tmp_path / "run"), watch=seen.append, factory=FakeFactory(behaviour)
    )
    assert result.location == str(tmp_path / "run")
    assert_same_result(dict(result.summary), tmp_path / "run", tmp_path / "local")
    assert len(result.rounds) == 6
    assert len(result.clients) == 6 * 3
    # Each record is shown once, in order.
    assert [record.round for status in seen for record in status.records] == list(range(6))
    assert seen[-1].rounds_done == 6
    again = launch.run(on_ray(), str(tmp_path / "run"), resume=True, factory=FakeFactory())
    assert again.summary == result.summary
    with pytest.raises(RunFolderError, match="holds a run already"):
        launch.run(on_ray(), str(tmp_path / "run"), factory=FakeFactory())


def test_an_error_of_the_users_watch_ends_the_run_with_its_rounds_saved(tmp_path):
    import ray

    expected_summary(tmp_path / "local")
    out = tmp_path / "run"

    def watch(status: Status) -> None:
        if status.rounds_done >= 2:
            raise ZeroDivisionError("the user's")

    with pytest.raises(ZeroDivisionError, match="the user's"):
        launch.run(on_ray(), str(out), watch=watch, factory=FakeFactory(SLOW))
    assert ray.is_initialized()
    deadline = time.monotonic() + 30
    while [each for each in ray.util.list_named_actors(True) if str(out) in each["name"]]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    kept = table(out, "rounds")["round"].tolist()
    assert kept == [*range(len(kept))]
    assert 2 <= len(kept) < 6
    time.sleep(1.0)
    assert table(out, "rounds")["round"].tolist() == kept
    assert not [name for name in RunFolder(out).names() if name.startswith(".")]
    result = launch.run(on_ray(), str(out), resume=True, factory=FakeFactory())
    assert_same_result(dict(result.summary), out, tmp_path / "local")


def test_a_detached_run_owns_its_folder_and_a_second_one_is_told_so(tmp_path, monkeypatch):
    import ray

    recipe, folder = on_ray(), RunFolder(tmp_path / "run")
    with claimed(folder, recipe, False) as lease:
        options = {"factory": FakeFactory(SLOW), "ticket": lease.ticket.detached()}
        server, _ = start_server(recipe, folder.location, detached=True, **options)
        wait_for_handover(server, lease)
    try:
        with pytest.raises(RunFolderError, match=r"owned by process \d+ on host"):
            launch.run(recipe, folder.location, factory=FakeFactory())
        assert over(server).phase == "done"
    finally:
        ray.kill(server)
    assert not [name for name in folder.names() if name.startswith(".")]
