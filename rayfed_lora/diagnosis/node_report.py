"""Software and GPUs of a node, and the findings about them. Source: this project."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from rayfed_lora.diagnosis.findings import Finding

PACKAGES = ("ray", "rayfed-lora", "torch", "peft", "transformers")
MISSING = "missing"
_MIB = 1.048576  # in MB
_SMI = "nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv,noheader,nounits"


@dataclass(frozen=True)
class Gpu:
    """A graphics card: its name, and its memory in MB (10^6 bytes)."""

    name: str
    total_mb: float
    free_mb: float


@dataclass(frozen=True)
class NodeReport:
    """Software and GPUs of a node.

    Attributes:
        node: its address.
        versions: of packages and of `python`, by name.
        gpus: cards that nvidia-smi lists.
        torch_gpus: number of cards that torch can use; None if the node has none.
        ray_gpus: number of GPUs that Ray assigns there.
        error: why the node gave no report, else "".
    """

    node: str
    versions: Mapping[str, str]
    gpus: tuple[Gpu, ...] = ()
    torch_gpus: int | None = None
    ray_gpus: float = 0.0
    error: str = ""


def inspect(node: str, ray_gpus: float) -> NodeReport:
    """Return the report of this machine; the arguments are fields of it."""
    gpus = cards()
    usable = None
    if gpus or ray_gpus:
        from rayfed_lora.training.device import seen_gpus

        usable = seen_gpus()
    return NodeReport(node, versions(), gpus, usable, ray_gpus)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that must be equal on all nodes."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING


def cards() -> tuple[Gpu, ...]:
    """Return this machine's NVIDIA cards; none without a driver."""
    try:
        output = subprocess.check_output(
            _SMI.split(), stderr=subprocess.DEVNULL, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = csv.reader(output.splitlines(), skipinitialspace=True)
    return tuple(Gpu(row[0], _mb(row[1]), _mb(row[2])) for row in rows)


def _mb(mebibytes: str) -> float:
    # [N/A] for a card that shares the host's memory.
    try:
        return float(mebibytes) * _MIB
    except ValueError:
        return 0.0


def check_nodes(reports: Sequence[NodeReport]) -> list[Finding]:
    """Return which nodes did not answer."""
    fix = (
        "see `ray status` and the logs of that node; install rayfed_lora and its dependencies in"
        " the environment that its Ray was started from"
    )
    silent = [report for report in reports if report.error]
    found = [Finding("fault", f"node {report.node}", report.error, fix) for report in silent]
    answered = len(reports) - len(found)
    return [Finding("ok", "nodes", f"{answered} of {len(reports)} answered"), *found]


def check_versions(reports: Sequence[NodeReport]) -> list[Finding]:
    """Compare the versions of all nodes that answered."""
    reports = [report for report in reports if not report.error]
    found = []
    for package in ("python", *PACKAGES):
        by_version = defaultdict(list)
        for report in reports:
            by_version[report.versions.get(package, MISSING)].append(report.node)
        if len(by_version) > 1 or MISSING in by_version:
            text = "; ".join(f"{v} on {', '.join(nodes)}" for v, nodes in by_version.items())
            lock = "from the same lock (constraints.txt), then restart their Ray"
            fix = f"install the same {package} on every node, {lock}"
            found.append(Finding("fault", f"version of {package}", text, fix))
    if found or not reports:
        return found
    same = ", ".join(f"{name} {version}" for name, version in reports[0].versions.items())
    return [Finding("ok", "versions", f"the same on every node: {same}")]


def check_gpus(reports: Sequence[NodeReport]) -> list[Finding]:
    """Compare the cards of each node with those that Ray assigns and torch can use."""
    reports = [report for report in reports if not report.error]
    found = [finding for report in reports for finding in _gpus_of(report)]
    return found or [Finding("ok", "GPUs", "none in the cluster: recipes run on CPUs")]


def _gpus_of(report: NodeReport) -> list[Finding]:
    subject, count = f"GPUs of {report.node}", len(report.gpus)
    if not count and not report.ray_gpus:
        return []
    cards = "; ".join(
        f"{gpu.name}, {gpu.free_mb / 1e3:.1f} of {gpu.total_mb / 1e3:.1f} GB free"
        for gpu in report.gpus
    )
    if not count:
        text = f"Ray assigns {report.ray_gpus:g}, nvidia-smi lists none"
        fix = "start Ray there without --num-gpus, or install the driver; actors fall back to CPUs"
        return [Finding("warning", subject, text, fix)]
    if not report.torch_gpus:
        fix = "install a torch there whose CUDA version the driver supports (nvidia-smi)"
        return [Finding("fault", subject, f"{cards}; torch can use none of them", fix)]
    if report.ray_gpus != count:
        text = f"{cards}; Ray assigns {report.ray_gpus:g} of {count}"
        return [Finding("warning", subject, text, f"start Ray there with --num-gpus={count}")]
    return [Finding("ok", subject, cards)]
