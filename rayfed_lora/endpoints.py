"""Which servers get the user's credentials: object stores that URIs name by their options.

A URI such as `s3://bucket/a?endpoint_override=host:9000` sends requests, signed with the user's
credentials, to any host. A recipe from a stranger could collect them that way. So requests to an
endpoint that only a recipe names are anonymous; `guarded` writes that into the URI, which then says
it wherever it travels. The environment, the command line and Python's `out=` name
endpoints as the user's own.

Source: this project.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from rayfed_lora.locations import is_uri

# Further endpoints that get the user's credentials, separated by commas: host:port or URLs.
OWN_ENDPOINTS = "RAYFED_LORA_ENDPOINTS"
_ENVIRONMENT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
_DEFAULT_PORTS = {"https": ":443", "http": ":80"}
_AZURE_OPTIONS = ("blob_storage_authority", "dfs_storage_authority")
_AZURE = ".core.windows.net"
# Keys of a recipe whose URIs are opened.
LOCATION_KEYS = ("data.source", "clients.availability.trace", "storage.path")


def endpoint(location: str) -> str | None:
    """Return the server that a URI's options name, None where the store's own is asked.

    >>> endpoint("s3://bucket/a?endpoint_override=Host:9000&scheme=http")
    'http://host:9000'
    >>> endpoint("s3://bucket/a?region=eu-central-1")
    """
    if not is_uri(location):
        return None
    try:
        parts = urlsplit(location)
    except ValueError:
        # Nothing opens it.
        return None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme in ("s3", "gs", "gcs"):
        host, scheme = options.get("endpoint_override", ""), options.get("scheme", "https")
        if parts.scheme == "s3" and not host and s3_endpoint() is not None:
            # The environment's, scheme and all.
            return None
        # Without encryption anybody on the way can read what is sent.
        return _normal(host or parts.scheme, scheme) if host or scheme != "https" else None
    if parts.scheme in ("abfs", "abfss"):
        host = parts.netloc.rpartition("@")[2].lower()
        named = [options[name] for name in _AZURE_OPTIONS if name in options]
        plain = options.get("enable_tls", "true").lower() != "true"
        standard = "." not in host or host.endswith(_AZURE)
        if named or plain or ":" in host or not standard:
            return _normal(",".join([host, *named]), "http" if plain else "https")
    return None


def s3_endpoint() -> str | None:
    """Return the URL that the environment names for S3, None where it names none."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _normal(host: str, scheme: str) -> str:
    """Return scheme and host in one spelling, without the scheme's own port."""
    if "://" in host:
        scheme, _, host = host.partition("://")
    scheme, host = scheme.lower(), host.lower().rstrip("/")
    return f"{scheme}://{host.removesuffix(_DEFAULT_PORTS.get(scheme, ':'))}"


def own_endpoints() -> frozenset[str]:
    """Return the endpoints that the user's environment names."""
    named = [os.environ.get(name, "") for name in _ENVIRONMENT]
    named += os.environ.get(OWN_ENDPOINTS, "").split(",")
    return frozenset(_normal(name.strip(), "https") for name in named if name.strip())


def anonymous(location: str) -> bool:
    """Return whether requests to a URI carry no credentials.

    >>> anonymous("s3://bucket/a?endpoint_override=host:9000&anonymous=true")
    True
    """
    return is_uri(location) and location == _anonymised(location)


def _anonymised(location: str) -> str:
    parts = urlsplit(location)
    if parts.scheme in ("gs", "gcs"):
        bucket = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"anonymous@{bucket}"))
    name, value = {
        "s3": ("anonymous", "true"),
        "abfs": ("credential_kind", "anonymous"),
        "abfss": ("credential_kind", "anonymous"),
    }.get(parts.scheme, ("", ""))
    if not name:
        return location
    others = [part for part in parts.query.split("&") if part and part.partition("=")[0] != name]
    return urlunsplit(parts._replace(query="&".join([*others, f"{name}={value}"])))


def guarded(location: str, named: Collection[str]) -> str:
    """Return a URI that sends no credentials to an endpoint that is not the user's own.

    >>> guarded("s3://bucket/a?endpoint_override=host:9000", ())
    's3://bucket/a?endpoint_override=host:9000&anonymous=true'
    >>> guarded("s3://bucket/a?endpoint_override=host:9000", ["https://host:9000"])
    's3://bucket/a?endpoint_override=host:9000'

    Args:
        location: path or URI, as a recipe has it.
        named: endpoints that the user has named, beside those of the environment.
    """
    server = endpoint(location)
    if server is None or server in named or server in own_endpoints():
        return location
    return _anonymised(location)


def unguarded(location: str) -> str:
    """Return a location without what `guarded` adds: two that are equal then are one place."""
    if not is_uri(location) or endpoint(location) is None:
        return location
    plain, _, options = location.partition("?")
    added = ("anonymous=true", "credential_kind=anonymous")
    rest = "&".join(part for part in options.split("&") if part and part not in added)
    plain = plain.replace("://anonymous@", "://", 1)
    return f"{plain}?{rest}" if rest else plain


def named_in(recipe: Mapping[str, Any]) -> frozenset[str]:
    """Return the endpoints that a recipe's values name and that get credentials.

    Args:
        recipe: nested values, any part of a recipe.
    """
    servers = (endpoint(value) for _, value in _locations(recipe) if not anonymous(value))
    return frozenset(server for server in servers if server is not None)


def guarded_in(recipe: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    """Return a recipe's values with every location guarded; see `guarded`."""
    result = dict(recipe)
    for path, value in _locations(recipe):
        safe = guarded(value, named)
        if safe != value:
            result = _replaced(result, path, safe)
    return result


def strangers_in(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield key and endpoint of each location whose requests carry no credentials."""
    for path, value in _locations(recipe):
        server = endpoint(value)
        if server is not None and anonymous(value):
            yield ".".join(path), server


def _locations(recipe: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for key in LOCATION_KEYS:
        found: Any = recipe
        path: tuple[str, ...] = ()
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                break
            found, path = found[part], (*path, part)
        # A trace may be written as a plain text in place of its section.
        if isinstance(found, str):
            yield path, found


def _replaced(recipe: Mapping[str, Any], path: tuple[str, ...], value: str) -> dict[str, Any]:
    first, *rest = path
    inner = _replaced(recipe[first], tuple(rest), value) if rest else value
    return {**recipe, first: inner}
