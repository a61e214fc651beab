"""The connection to Ray: a cluster, or a Ray that is started for one command.

Source: this project.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rayfed_lora.errors import ResourceError
from rayfed_lora.jobs.dashboard import unreachable_cluster
from rayfed_lora.launching.token_file import keep_token_private

NAMESPACE = "rayfed_lora"
# Set before an own Ray starts; a value that the user has set stays.
_OWN_RAY = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    # Nothing reads the metrics of a Ray that ends with its run; to collect them took 1 % of a core.
    "RAY_enable_metrics_collection": "0",
    # Bytes up to which a result travels inside the reply to its call (Ray's default: 100 kB).
    # Larger results go through the object store: 1.5 ms later on two busy cores.
    "RAY_max_direct_call_object_size": str(1 << 19),
}


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or start an own Ray for the duration of the block.

    Args:
        address: of the cluster; default $RAY_ADDRESS. Without either, an own Ray is started.

    Raises:
        ResourceError: no cluster answers at the address, or Ray cannot start.
    """
    where = address or os.environ.get("RAY_ADDRESS")
    if where is None:
        for name, value in _OWN_RAY.items():
            # Ray reads this one at import: set later, it would apply to the processes that Ray
            # starts, but not to this process.
            if name != "RAY_AUTH_MODE" or "ray" not in sys.modules:
                os.environ.setdefault(name, value)
    reason = None if where is None else unreachable_cluster(where)
    if reason is not None:
        raise ResourceError(f"no Ray cluster at {where}: {reason}")
    import ray

    if ray.is_initialized():
        yield
        return
    if where is None:
        keep_token_private()
    try:
        ray.init(
            address=where or "local",
            namespace=NAMESPACE,
            logging_level="ERROR",
            log_to_driver=False,
            **({} if where else {"include_dashboard": False}),
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ResourceError(f"no Ray cluster at {where or 'this machine'}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()
