"""Addresses, ports and the jobs client of a cluster's dashboard. Source: this project."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from rayfed_lora.errors import BadInputError, ResourceError, RunError, did_you_mean
from rayfed_lora.recipe.faults import closest

# Ray prefers these to the address in its arguments.
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_VERBOSE_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_TOKEN_HINT = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
    " (default ~/.ray/auth_token) or RAY_AUTH_TOKEN to the token itself"
)
_CONNECT_S = 10.0
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def dashboard_url(address: str | None) -> str:
    """Return the URL of the dashboard at a URL or `host:port`; else raise BadInputError.

    The default address is $RAY_API_SERVER_ADDRESS or $RAY_ADDRESS.
    """
    found = address or next(filter(None, map(os.environ.get, _OVERRIDES)), None)
    url = found if found is None or "://" in found else f"http://{found}"
    if not _is_http(url or ""):
        raise BadInputError(
            "--address: expected the address of a cluster's dashboard, e.g. http://127.0.0.1:8265"
            f" (ray dashboard cluster.yaml opens a tunnel to it), got {found!r}"
        )
    return str(url).rstrip("/")


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # urlsplit checks the port only when it is read.
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.hostname not in (None, "", "auto")


def is_dashboard(address: str | None) -> bool:
    """Return whether an address, by default $RAY_ADDRESS, is the URL of a dashboard."""
    found = address or os.environ.get("RAY_ADDRESS") or ""
    return found.startswith(("http://", "https://"))


def unreachable(host: str, port: int) -> str | None:
    """Return why a TCP port accepts no connection, None if it does; Ray would wait for minutes."""
    try:
        socket.create_connection((host, port), _CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        return str(error)
    return None


def unreachable_cluster(address: str) -> str | None:
    """Return why `host:port` accepts no connection, None if it does or is another address."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address or not port.isdecimal():
        return None
    return unreachable(host.strip("[]"), int(port))


def client_of(address: str | None) -> Any:
    """Return Ray's client for jobs; ResourceError if nothing answers or the token is rejected."""
    url = dashboard_url(address)
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    reason = unreachable(parts.hostname or "", port)
    if reason is not None:
        raise ResourceError(
            f"no Ray dashboard at {url}: {reason}; is the cluster up, and the tunnel to it open"
            " (ray dashboard cluster.yaml)?"
        )
    with translated_errors(), _only(url):
        from ray.job_submission import JobSubmissionClient

        for name in _VERBOSE_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        return JobSubmissionClient(url)


@contextmanager
def _only(url: str) -> Iterator[None]:
    """Make Ray use this address, whatever the environment says."""
    before = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    os.environ[_OVERRIDES[0]] = url
    try:
        yield
    finally:
        del os.environ[_OVERRIDES[0]]
        os.environ.update(before)


@contextmanager
def translated_errors(
    job: str | None = None, known: Callable[[], Sequence[str]] = tuple
) -> Iterator[None]:
    """Raise errors of Ray's client as errors of this package, without any token in them.

    An id `job` in the request is checked first, since it becomes a part of a URL. `known` returns
    the ids that there are, for the message.

    Raises:
        BadInputError: there is no such job.
        ResourceError: the dashboard does not answer, or rejects the token.
        RunError: any other error.
    """
    import requests
    from ray.exceptions import AuthenticationError

    if job is not None and not _JOB_ID.fullmatch(job):
        raise BadInputError(f"job: expected an id as rayfed-lora status lists them, got {job!r}")
    try:
        yield
    except AuthenticationError as error:
        first = str(error).splitlines()[0].split(". ")[0]
        raise ResourceError(f"{first}; {_TOKEN_HINT}") from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise ResourceError(f"the Ray dashboard does not answer as expected: {error}") from None
    except RuntimeError as error:
        if job is not None and "status code 404" in str(error):
            nearest = did_you_mean(closest(job, known()))
            raise BadInputError(f"no job {job!r} in this cluster{nearest}") from None
        raise RunError(f"the cluster rejected the request: {error}") from None
