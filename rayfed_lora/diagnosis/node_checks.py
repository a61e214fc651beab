"""Checks that run on the nodes of a cluster. Source: this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayfed_lora.diagnosis import node_report
from rayfed_lora.diagnosis.findings import Finding
from rayfed_lora.diagnosis.node_report import NodeReport
from rayfed_lora.errors import RayfedError
from rayfed_lora.storage import RunFolder

_ANSWER_S = 60.0
# More than Ray sends inside a call: a parcel travels between the nodes' object stores.
_PARCEL_BYTES = 2_000_000


class Unanswered(Exception):
    """Stands for the missing answer of a node; its text is the reason, in one line."""


def on_node(node_id: str, ask: Callable[..., Any], *arguments: Any) -> ray.ObjectRef:
    """Start a function on one node, without a share of its resources."""
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": strategy}
    return ray.remote(ask).options(**options).remote(*arguments)


def answers(asked: Sequence[ray.ObjectRef], timeout_s: float = _ANSWER_S) -> list[Any]:
    """Wait for all answers together; return an `Unanswered` for each missing one.

    A task that takes too long is killed with its worker process.
    """
    if not asked:
        return []
    _, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    found = [_answer(each) for each in asked]
    for each in late:
        ray.cancel(each, force=True)
    return found


def _answer(asked: ray.ObjectRef) -> Any:
    try:
        return ray.get(asked, timeout=0)
    except GetTimeoutError:
        return Unanswered("no answer in time")
    except RayError as error:
        if isinstance(error, RayTaskError) and error.cause is not None:
            return Unanswered(f"{type(error.cause).__name__}: {error.cause}")
        lines = str(error).strip().splitlines()
        return Unanswered(lines[-1] if lines else type(error).__name__)


def _on_each(
    nodes: Sequence[Mapping[str, Any]], ask: Callable[..., Any], *arguments: Sequence[Any]
) -> list[Any]:
    """Call a function on each node with the node's own arguments; return the answers."""
    rows = zip(nodes, *arguments, strict=True)
    return answers([on_node(node["NodeID"], ask, *row) for node, *row in rows])


def reports(nodes: Sequence[Mapping[str, Any]]) -> list[NodeReport]:
    """Return the report of each live node, an entry of `ray.nodes()`."""
    names = [node_name(node) for node in nodes]
    gpus = [float(node["Resources"].get("GPU", 0.0)) for node in nodes]
    answered = _on_each(nodes, node_report.inspect, names, gpus)
    return [
        NodeReport(name, {}, ray_gpus=assigned, error=str(answer))
        if isinstance(answer, Unanswered)
        else answer
        for name, assigned, answer in zip(names, gpus, answered, strict=True)
    ]


def node_name(node: Mapping[str, Any]) -> str:
    """Return a name for people: the address and the start of Ray's id."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"


def check_network(nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Check that each node can fetch an object from the next one."""
    if len(nodes) < 2:
        return []
    names = [node_name(node) for node in nodes]
    parcels = [on_node(node["NodeID"], _parcel) for node in nodes]
    fetched = _on_each(nodes, _size, [*parcels[1:], parcels[0]])
    fix = (
        "open all TCP ports between the nodes of the cluster (security group, firewall); Ray's"
        " object manager, raylets and workers talk directly"
    )
    found = [
        Finding("fault", "ports", f"{name} gets no object of {other}: {answer}", fix)
        for name, other, answer in zip(names, [*names[1:], names[0]], fetched, strict=True)
        if answer != _PARCEL_BYTES
    ]
    return found or [Finding("ok", "ports", "each node gets objects of the next one")]


def _parcel() -> bytes:
    return bytes(_PARCEL_BYTES)


def _size(parcel: bytes) -> int:
    return len(parcel)


def check_storage(location: str, nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Check that each node can write into a folder and read the files of the others."""
    subject, names = f"storage {location}", [node_name(node) for node in nodes]
    locations = [location] * len(nodes)
    marks = [f".doctor-{uuid4().hex}" for _ in nodes]
    written = _on_each(nodes, _write, locations, marks)
    fix = "give every node the right to write there (its user, or its role for a bucket)"
    found = [
        Finding("fault", subject, f"{name} cannot write to it: {answer}", fix)
        for name, answer in zip(names, written, strict=True)
        if not isinstance(answer, list)
    ]
    if not found:
        unseen = _on_each(nodes, _unseen, locations, [marks] * len(nodes))
        fix = "use a folder that all nodes mount (NFS), or a URI such as s3://bucket/runs"
        found = [
            Finding(
                "fault", subject, f"{name} does not see files that other nodes wrote there", fix
            )
            for name, answer in zip(names, unseen, strict=True)
            if answer != 0
        ]
    _on_each(nodes, _remove, locations, marks)
    made = [folders if isinstance(folders, list) else [] for folders in written]
    _on_each(nodes, _remove_folders, made)
    return found or [
        Finding("ok", subject, "every node can write to it and read files of the others")
    ]


def _write(location: str, mark: str) -> list[str] | str:
    """Return the folders that were created, or why the write failed."""
    try:
        folder = RunFolder(location)
        above = [] if folder.local is None else [folder.local, *folder.local.parents]
        made = [str(each) for each in above if not each.exists()]
        folder.write(mark, b"")
        return made
    except (RayfedError, OSError) as error:
        return str(error)


def _unseen(location: str, marks: Sequence[str]) -> int:
    folder = RunFolder(location)
    return sum(not folder.exists(mark) for mark in marks)


def _remove(location: str, mark: str) -> None:
    with suppress(RayfedError, OSError):
        RunFolder(location).remove(mark)


def _remove_folders(made: Sequence[str]) -> None:
    for folder in made:
        with suppress(OSError):
            Path(folder).rmdir()
