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

from rayfed_lora.doctor import node_report
from rayfed_lora.doctor.findings import Finding
from rayfed_lora.doctor.node_report import NodeReport
from rayfed_lora.errors import RayfedError
from rayfed_lora.storage import RunFolder

_ANSWER_S = 60.0
# More than Ray sends inside a call: a parcel travels between the nodes' object stores.
_PARCEL_BYTES = 2_000_000


class Unanswered:
    """The missing answer of a node.

    Attributes:
        reason: why it is missing, in one line.
    """

    def __init__(self, error: Exception) -> None:
        """Keep the reason."""
        if isinstance(error, GetTimeoutError):
            self.reason = "no answer in time"
        elif isinstance(error, RayTaskError) and error.cause is not None:
            self.reason = f"{type(error.cause).__name__}: {error.cause}"
        else:
            lines = str(error).strip().splitlines()
            self.reason = lines[-1] if lines else type(error).__name__


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
    except RayError as error:
        return Unanswered(error)


def reports(nodes: Sequence[Mapping[str, Any]]) -> list[NodeReport]:
    """Return the report of each live node.

    Args:
        nodes: entries of `ray.nodes()`.
    """
    asked = [
        (node_name(node), float(node["Resources"].get("GPU", 0.0)), node["NodeID"])
        for node in nodes
    ]
    inspect = node_report.inspect
    answered = answers([on_node(node_id, inspect, name, gpus) for name, gpus, node_id in asked])
    return [
        NodeReport(name, {}, ray_gpus=gpus, error=answer.reason)
        if isinstance(answer, Unanswered)
        else answer
        for (name, gpus, _), answer in zip(asked, answered, strict=True)
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
    after = [*parcels[1:], parcels[0]]
    fetched = [on_node(n["NodeID"], _size, ref) for n, ref in zip(nodes, after, strict=True)]
    found = []
    for name, other, answer in zip(names, [*names[1:], names[0]], answers(fetched), strict=True):
        if answer != _PARCEL_BYTES:
            reason = answer.reason if isinstance(answer, Unanswered) else repr(answer)
            fix = (
                "open all TCP ports between the nodes of the cluster (security group,"
                " firewall); Ray's object manager, raylets and workers talk directly"
            )
            found.append(
                Finding("fault", "ports", f"{name} gets no object of {other}: {reason}", fix)
            )
    return found or [Finding("ok", "ports", "each node gets objects of the next one")]


def _parcel() -> bytes:
    return bytes(_PARCEL_BYTES)


def _size(parcel: bytes) -> int:
    return len(parcel)


def check_storage(location: str, nodes: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Check that each node can write into a folder and read the files of the others."""
    subject, names = f"storage {location}", [node_name(node) for node in nodes]
    ids = [node["NodeID"] for node in nodes]
    marks = [f".doctor-{uuid4().hex}" for _ in nodes]
    written = answers([on_node(n, _write, location, m) for n, m in zip(ids, marks, strict=True)])
    found = [
        Finding("fault", subject, f"{name} cannot write to it: {_reason(answer)}", _WRITABLE)
        for name, answer in zip(names, written, strict=True)
        if not isinstance(answer, list)
    ]
    if not found:
        seen = answers([on_node(n, _unseen, location, marks) for n in ids])
        found = [
            Finding(
                "fault", subject, f"{name} does not see files that other nodes wrote there", _SHARED
            )
            for name, answer in zip(names, seen, strict=True)
            if answer != 0
        ]
    answers([on_node(n, _remove, location, m) for n, m in zip(ids, marks, strict=True)])
    made = [folders if isinstance(folders, list) else [] for folders in written]
    answers([on_node(n, _remove_folders, each) for n, each in zip(ids, made, strict=True)])
    return found or [
        Finding("ok", subject, "every node can write to it and read files of the others")
    ]


_WRITABLE = "give every node the right to write there (its user, or its role for a bucket)"
_SHARED = "use a folder that all nodes mount (NFS), or a URI such as s3://bucket/runs"


def _reason(answer: Any) -> str:
    return answer.reason if isinstance(answer, Unanswered) else str(answer)


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
