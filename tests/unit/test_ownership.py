"""One owner a folder, on mounted, S3 and other storage: taken, kept, lost and taken over."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayfed_lora.errors import InterruptedRunError, RunError, RunFolderError
from rayfed_lora.runs import ownership
from rayfed_lora.runs.leases import lease_files
from rayfed_lora.runs.leases.lease_files import MountedFiles, PlainFiles
from rayfed_lora.runs.leases.record import Process, is_alive, owner_text, seconds, this_process
from rayfed_lora.runs.leases.s3_files import NoConditionalWritesError, S3Files, s3_client
from rayfed_lora.runs.ownership import Lease, Pace, Ticket, owned, owner_of, take
from rayfed_lora.storage import RunFolder

QUICK = Pace(renew_s=0.1, stale_s=1.0)
# Long enough for a busy machine.
PATIENT = Pace(renew_s=0.1, stale_s=60.0)
ELSEWHERE = Process("far-away", "another boot pid:[1]", 4711, 17)
DEAD = replace(this_process(), started=1)


@pytest.fixture(params=["mounted", "s3", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> RunFolder:
    if request.param == "s3":
        found = RunFolder(request.getfixturevalue("bucket").uri("runs/a"))
        assert isinstance(ownership.lease_files(found), S3Files)
        return found
    if request.param == "plain":
        monkeypatch.setattr(ownership, "lease_files", PlainFiles)
        monkeypatch.setattr(lease_files, "_SETTLE_S", 0.05)
    return RunFolder(tmp_path / "new" / "run")


@pytest.fixture
def here(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "new" / "run")


def written(
    folder: RunFolder, owner: Process, number: int = 1, starter: Process | None = None
) -> bytes:
    """Write the lease of another process, which nobody renews."""
    record = ownership.Record("a token", "a run", owner, starter, "2026-01-01 10:00:00")
    assert ownership.lease_files(folder).create(number, record.content())
    return record.content()


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def leases() -> Iterator[list[Lease]]:
    """Leases that are released when the test is done."""
    found: list[Lease] = []
    yield found
    for lease in found:
        lease.release()


# --- taking -------------------------------------------------------------------------------------


def test_an_owned_folder_names_its_owner_and_a_released_one_is_as_before(folder):
    lease = take(folder, pace=PATIENT)
    owner = owner_of(folder)
    assert owner == owner_text(lease.record)
    assert f"process {os.getpid()} on host {this_process().host} since 20" in owner
    lease.check()
    assert folder.names() == [".owner-1.json"]
    lease.release()
    assert owner_of(folder) is None
    assert folder.names() == []
    assert not folder.exists("")


def test_of_many_that_start_together_one_gets_the_folder(folder, leases):
    barrier = threading.Barrier(8)

    def start(_: int) -> Lease | str:
        barrier.wait(30)
        try:
            return take(folder, pace=PATIENT)
        except RunFolderError as error:
            return str(error)

    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(start, range(8))]
    leases += [each for each in found if isinstance(each, Lease)]
    assert len(leases) == 1
    refused = [each for each in found if isinstance(each, str)]
    assert len(refused) == 7
    named = [each for each in refused if f"owned by process {os.getpid()} on host" in each]
    # A lease file that is being written does not tell yet.
    assert len(named) + sum("an unknown process" in each for each in refused) == 7


def test_of_many_that_take_over_from_one_dead_owner_one_gets_the_folder(folder, leases):
    written(folder, DEAD, number=4)
    barrier = threading.Barrier(8)

    def start(_: int) -> Lease | None:
        barrier.wait(30)
        try:
            return take(folder, wait=True, pace=PATIENT)
        except RunFolderError:
            return None

    with ThreadPoolExecutor(8) as threads:
        leases += [each for each in threads.map(start, range(8)) if each is not None]
    assert len(leases) == 1
    leases[0].check()
    assert folder.names() == [".owner-5.json"]


def _take_in_a_process(location: str, start_at: float, answers: Any) -> None:
    time.sleep(max(start_at - time.monotonic(), 0.0))
    try:
        lease = take(RunFolder(location), pace=PATIENT)
    except RunFolderError:
        answers.put("refused")
        return
    answers.put("owner")
    time.sleep(1.0)
    lease.release()


@pytest.mark.parametrize("dead", [False, True], ids=["new", "dead owner"])
def test_of_many_processes_that_start_together_one_gets_the_folder(here, dead):
    if dead:
        written(here, DEAD)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    arguments = (here.location, time.monotonic() + 6.0, answers)
    processes = [context.Process(target=_take_in_a_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    assert sorted(found) == ["owner", "refused", "refused", "refused"]
    assert here.names() == []


def test_a_dead_process_of_this_machine_is_replaced_at_once_without_a_word(folder, leases):
    written(folder, DEAD)
    leases.append(take(folder, tell=pytest.fail, pace=PATIENT))
    assert folder.names() == [".owner-2.json"]


def test_a_lease_of_another_machine_is_not_taken_without_wait(folder):
    content = written(folder, ELSEWHERE)
    with pytest.raises(RunFolderError, match="process 4711 on host far-away since 2026-01-01"):
        take(folder, pace=QUICK)
    assert folder.read(".owner-1.json") == content


def test_a_lease_of_another_machine_is_taken_once_its_counter_stood_still(folder, leases):
    written(folder, ELSEWHERE)
    told: list[str] = []
    began = time.monotonic()
    leases.append(take(folder, wait=True, tell=told.append, pace=QUICK))
    assert time.monotonic() - began >= QUICK.stale_s
    assert len(told) == 1
    assert "owned by process 4711 on host far-away" in told[0]
    assert "waiting up to 1 s" in told[0]
    leases[0].check()


def test_who_waits_beside_a_live_owner_is_refused_once_the_counter_has_moved(folder, leases):
    leases.append(take(folder, pace=Pace(0.1, 60.0)))
    began = time.monotonic()
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} .* whose run is still active"):
        take(folder, wait=True, pace=Pace(0.6, 60.0))
    assert time.monotonic() - began < 20
    leases[0].check()


def test_a_lease_that_cannot_be_read_is_judged_by_standing_still(here, leases):
    here.write(".owner-3.json", b"{")
    with pytest.raises(RunFolderError, match="an unknown process"):
        take(here, pace=QUICK)
    leases.append(take(here, wait=True, pace=QUICK))
    assert here.names() == [".owner-4.json"]


def test_a_ticket_takes_the_folder_over_at_once_and_the_first_process_stops(folder, leases):
    first = take(folder, Ticket("a run"), pace=PATIENT)
    leases.append(take(folder, first.ticket, pace=PATIENT))
    assert first.handed_over()
    # Remote storage is asked from time to time only.
    time.sleep(PATIENT.renew_s / 3)
    with pytest.raises(RunError, match="has lost it to process"):
        first.check()
    first.release()
    leases[0].check()


def test_a_killed_commands_driver_is_waited_for_as_long_as_it_lives(here, leases):
    # The driver actor lives, and renews; the command that started it is dead.
    files = MountedFiles(here.local)
    content = written(here, this_process(), starter=DEAD)
    gone = threading.Event()

    def renew() -> None:
        now, counter = content, 0
        while not gone.wait(0.05):
            counter += 1
            new = replace(ownership.Record.read(now), counter=counter).content()
            if not files.rewrite(1, now, new):
                return
            now = new
        files.remove(1)

    thread = threading.Thread(target=renew)
    thread.start()
    threading.Timer(1.0, gone.set).start()
    leases.append(take(here, Ticket("another run"), wait=True, pace=Pace(0.3, 30.0)))
    assert gone.is_set()
    thread.join()


# --- keeping ------------------------------------------------------------------------------------


def test_an_owner_renews_the_counter_and_nothing_else(folder, leases):
    leases.append(take(folder, pace=QUICK))
    first = json.loads(folder.read(".owner-1.json"))
    until(lambda: json.loads(folder.read(".owner-1.json"))["counter"] >= 3)
    last = json.loads(folder.read(".owner-1.json"))
    assert {**last, "counter": 0} == {**first, "counter": 0}
    assert len(folder.read(".owner-1.json")) == 1024


def test_a_loser_writes_and_removes_nothing(folder):
    with pytest.raises(RunError, match=r"has lost it to process .*; nothing more is saved"):
        with owned(folder, Ticket("a run")) as (mine, _):
            mine.write("before", b"1")
            other = take(folder, Ticket("a run"), pace=PATIENT)
            time.sleep(1.1 * ownership.PACE.renew_s / 3)
            with pytest.raises(RunError, match="has lost it"):
                mine.remove("before")
            mine.write("after", b"2")
    assert folder.names() == [".owner-2.json", "before"]
    other.release()


def test_a_write_that_had_begun_when_the_folder_was_lost_is_not_seen(here):
    with pytest.raises(RunError, match="has lost it"):
        with owned(here, Ticket("a run")) as (mine, _), mine.open_to_write("table") as stream:
            stream.write(b"old")
            other = take(here, Ticket("a run"))
            here.write("table", b"new")
    assert here.read("table") == b"new"
    assert not [name for name in here.names() if name.startswith(".table")]
    other.release()


def test_a_run_that_stops_because_it_has_lost_the_folder_says_so(here):
    with pytest.raises(RunError, match="has lost it"):
        with owned(here, Ticket("a run")) as (_, lease):
            other = take(here, Ticket("a run"))
            with pytest.raises(RunError):
                lease.check()
            assert lease.or_lost(lambda: False)()
            raise InterruptedRunError("stopped")
    other.release()


def test_a_run_that_the_user_stops_says_that(here):
    with pytest.raises(InterruptedRunError, match="stopped"):
        with owned(here):
            raise InterruptedRunError("stopped")
    assert here.names() == []


def test_an_owner_whose_starter_is_gone_writes_no_more(here):
    lease = take(here, Ticket("a run", starter=DEAD), pace=PATIENT)
    with pytest.raises(RunError, match=r"the command that started this run \(\d+\) is gone"):
        lease.check()
    lease.release()
    assert here.names() == []


def test_an_owner_that_was_asleep_goes_on_where_nobody_took_the_folder(here, leases, monkeypatch):
    leases.append(take(here, pace=Pace(0.5, 20.0)))
    now = seconds
    monkeypatch.setattr("rayfed_lora.runs.leases.lease.seconds", lambda: now() + 3600.0)
    leases[0].check()
    assert not leases[0].lost


def test_an_owner_that_was_asleep_stops_where_the_folder_was_taken(here, monkeypatch):
    sleeping = take(here, Ticket("a run"), pace=Pace(3600.0, 7200.0))
    other = take(here, Ticket("a run"), pace=PATIENT)
    with pytest.raises(RunError, match="has lost it to process"):
        sleeping.check()
    sleeping.release()
    other.check()
    other.release()
    assert here.names() == []


def test_a_former_owner_is_not_taken_for_a_later_one_of_the_same_number(here):
    sleeping = take(here, pace=Pace(3600.0, 7200.0))
    RunFolder(here.location).remove(".owner-1.json")
    other = take(here, pace=PATIENT)
    assert here.names() == [".owner-1.json"]
    with pytest.raises(RunError, match="has lost it"):
        sleeping.check()
    sleeping.release()
    other.check()
    other.release()


def test_an_outage_that_is_over_costs_no_run_however_long_it_was(bucket, leases):
    leases.append(take(RunFolder(bucket.uri("runs/a")), pace=Pace(0.1, 1.0)))
    with bucket.store.refusing(lambda method, url: "owner" in url):
        time.sleep(0.3)
        leases[0].check()
        time.sleep(2.5)
        assert not leases[0].lost
    leases[0].check()
    assert not leases[0].lost


def test_a_write_after_a_long_outage_waits_until_the_lease_can_be_read(bucket, leases):
    leases.append(take(RunFolder(bucket.uri("runs/a")), pace=Pace(0.1, 20.0)))
    lease = leases[0]
    over = threading.Event()
    with bucket.store.refusing(lambda method, url: "owner" in url and not over.is_set()):
        lease._renewed_at -= 15.0
        threading.Timer(2.0, over.set).start()
        lease.check()
    assert over.is_set()


def test_a_write_whose_lease_cannot_be_read_at_all_is_refused(bucket):
    lease = take(RunFolder(bucket.uri("runs/a")), pace=Pace(0.1, 1.0))
    with bucket.store.refusing(lambda method, url: "owner" in url):
        time.sleep(1.0)
        with pytest.raises(RunError, match=r"its lease cannot be read .* nothing more is saved"):
            lease.check()
    lease.release()
    assert bucket.keys("runs") == []


def test_a_folder_that_was_taken_during_an_outage_of_its_owner_is_lost(here, leases, monkeypatch):
    lease = take(here, Ticket("a run"), pace=Pace(0.1, 2.0))
    out = threading.Event()
    real = MountedFiles.read

    def read(self: MountedFiles, number: int) -> bytes | None:
        if self is lease.files and not out.is_set():
            raise OSError("no route to host")
        return real(self, number)

    def rewrite(self: MountedFiles, number: int, old: bytes, new: bytes) -> bool:
        raise OSError("no route to host")

    monkeypatch.setattr(MountedFiles, "read", read)
    monkeypatch.setattr(lease.files, "rewrite", rewrite.__get__(lease.files))
    leases.append(take(here, Ticket("a run"), pace=PATIENT))
    time.sleep(1.2)
    assert not lease.lost
    out.set()
    monkeypatch.undo()
    with pytest.raises(RunError, match="has lost it to process"):
        lease.check()
    leases[0].check()


def test_a_kept_lease_stays_for_the_process_that_takes_it_over(folder, leases):
    lease = take(folder, Ticket("a run"), pace=PATIENT)
    lease.keep()
    lease.release()
    assert folder.names() == [".owner-1.json"]
    leases.append(take(folder, Ticket("a run"), pace=PATIENT))
    assert folder.names() == [".owner-2.json"]


STOPPED = """\
import sys, time
from rayfed_lora.runs.ownership import Pace, Ticket, owned, take
from rayfed_lora.storage import RunFolder

folder = RunFolder(sys.argv[1])
lease = take(folder, pace=Pace(0.1, 1.0))
mine = folder.guarded(lease.check)
for i in range(10**6):
    mine.write("count", str(i).encode())
    time.sleep(0.01)
"""


def test_a_process_that_was_stopped_and_wakes_after_a_takeover_writes_nothing(here, leases):
    words = [sys.executable, "-c", STOPPED, here.location]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: here.exists("count"))
            process.send_signal(signal.SIGSTOP)
            # Alive, and of this machine: judged by its counter.
            leases.append(take(here, wait=True, pace=QUICK))
            here.write("count", b"ours")
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 1
    assert f"has lost it to process {os.getpid()} on host" in said
    assert here.read("count") == b"ours"
    leases[0].check()


# --- storage ------------------------------------------------------------------------------------


def test_without_boto3_s3_is_written_by_best_effort_and_the_user_is_told(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    files = ownership.lease_files(RunFolder(bucket.uri("runs/a")))
    assert isinstance(files, PlainFiles)
    assert files.note is not None and "rayfed-lora[aws]" in files.note


def test_a_store_without_conditional_writes_is_written_by_best_effort(bucket, monkeypatch):
    def refuses(*args: object) -> bool:
        raise NoConditionalWritesError("NotImplemented")

    monkeypatch.setattr(S3Files, "create", refuses)
    monkeypatch.setattr(lease_files, "_SETTLE_S", 0.0)
    lease = take(RunFolder(bucket.uri("runs/a")))
    assert lease.files.note is not None and "no conditional writes" in lease.files.note
    lease.check()
    lease.release()
    assert bucket.keys("runs") == []


def test_a_client_of_an_anonymous_filesystem_is_anonymous_and_asks_the_same_endpoint():
    from botocore import UNSIGNED
    from pyarrow import fs

    asked = fs.S3FileSystem(
        anonymous=True, endpoint_override="127.0.0.1:9", scheme="http", region="eu-west-1"
    )
    client = s3_client(asked)
    assert client.meta.config.signature_version is UNSIGNED
    assert client.meta.endpoint_url == "http://127.0.0.1:9"
    assert client.meta.region_name == "eu-west-1"


def test_a_folder_that_cannot_be_made_is_a_run_folder_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="can be read and written"):
        take(RunFolder(tmp_path / "file" / "run"))


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_what_is_no_lease_file_under_the_name_of_one_is_named_and_not_waited_for(here, kind):
    here.write("x", b"{}")
    path = here.local / ".owner-1.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("x" if kind == "link" else "nowhere")
    assert owner_of(here) is None
    with pytest.raises(RunFolderError, match=r"can be read and written; .*\.owner-1\.json"):
        take(here, pace=PATIENT)


def test_a_lease_file_that_is_listed_and_never_there_ends_the_wait(here, monkeypatch):
    monkeypatch.setattr(ownership, "numbers_in", lambda folder: [3])
    with pytest.raises(RunFolderError, match=r"\.owner-3\.json is listed, but is not there"):
        take(here, pace=QUICK)


def test_a_full_disk_leaves_no_lease_file(here, monkeypatch):
    here.write("x", b"")

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RunFolderError, match="No space left"):
            take(here, pace=QUICK)
    assert here.names() == ["x"]


@pytest.mark.parametrize("name", [".owner-01.json", ".owner-0.json", ".owner-1.json.x"])
def test_other_names_are_no_lease_files(here, leases, name):
    here.write(name, b"{}")
    leases.append(take(here, pace=PATIENT))
    assert here.names() == sorted([name, ".owner-1.json"])


# --- processes ----------------------------------------------------------------------------------


def test_a_process_is_alive_until_it_ends_and_a_stopped_one_is():
    assert is_alive(this_process()) is True
    assert is_alive(DEAD) is False
    assert is_alive(ELSEWHERE) is None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = replace(this_process(), pid=child.pid, started=0)
        assert is_alive(process) is True
        child.send_signal(signal.SIGSTOP)
        assert is_alive(process) is True
        child.kill()
        # Nobody has collected it yet.
        until(lambda: is_alive(process) is False)
        child.stdin.close()
    assert is_alive(process) is False


def test_without_proc_nobody_is_known_to_be_dead(tmp_path, monkeypatch):
    monkeypatch.setattr("rayfed_lora.runs.leases.record._PROC", tmp_path)
    assert is_alive(DEAD) is None
