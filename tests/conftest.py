"""What all tests share: no network, and one local Ray for those that need it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from rayfed_lora.plugins.registry import TABLES
from tests.object_store import ENVIRONMENT, bucket, object_store  # noqa: F401 - fixtures

os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported: two pytest processes on two cores, with two threads each, took half as
# much time again.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.update(ENVIRONMENT)
# The same examples in each run, on a machine that is busy with other tests.
settings.register_profile(
    "ours", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ours")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with 4 logical CPUs and 2 logical GPUs; its workers can import `tests.fakes`."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="rayfed_lora",
    )
    yield
    ray.shutdown()


@pytest.fixture
def forgotten_methods() -> Iterator[None]:
    """Forget the methods that a test has registered."""
    before = {kind: set(table) for kind, table in TABLES.items()}
    yield
    for kind, table in TABLES.items():
        for name in set(table) - before[kind]:
            table.remove(name)
