"""The check of a cluster's dashboard and its token. Source: this project."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import ray
from ray.dashboard.utils import ray_address_to_api_server_url

from rayfed_lora.diagnosis.findings import Finding

_ANSWER_S = 10.0


def check_dashboard() -> list[Finding]:
    """Check that the cluster has a dashboard, and that it asks for a token."""
    try:
        url = ray_address_to_api_server_url(ray.get_runtime_context().gcs_address)
    except ValueError as error:
        fix = "install ray[default] on the head node"
        return [Finding("warning", "dashboard", f"none: {error}", fix)]
    return [judge_dashboard(url, answer_without_token(url))]


def answer_without_token(url: str) -> int | None:
    """Return the HTTP status of a request for jobs without a token, None without an answer."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/api/jobs/", timeout=_ANSWER_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def judge_dashboard(url: str, status: int | None) -> Finding:
    """Return a finding on access to the dashboard, from the status from `answer_without_token`."""
    if status is None:
        text = f"none answers at {url} from here: no jobs, no metrics, its token was not checked"
        fix = "check from the head node, or start the head with --include-dashboard=true"
        return Finding("warning", "dashboard", text, fix)
    if status in (401, 403):
        return Finding("ok", "dashboard", f"{url} asks for the token")
    fix = (
        "set RAY_AUTH_MODE=token on every node and client (ray get-auth-token --generate), and"
        " start the head with --dashboard-host=127.0.0.1"
    )
    local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    users = "every user of the head node" if local else "anyone who reaches that port"
    text = f"{url} asks for no token: {users} can run code in the cluster"
    return Finding("warning" if local else "fault", "token", text, fix)
