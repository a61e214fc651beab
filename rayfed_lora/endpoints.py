"""Which object stores get the user's credentials. Source: this project.

A URI such as `s3://bucket/a?endpoint_override=host:9000` sends signed requests to any host, so that
a recipe of unknown origin could collect credentials. Requests to an endpoint that only a recipe
names are therefore anonymous; `guarded` adds this as an option to the URI, so that every process
obeys it. Endpoints named by the environment, the command line or `out=` are the user's own.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from rayfed_lora.locations import is_uri

# Further endpoints that get the user's credentials: host:port or URLs, separated by commas.
OWN_ENDPOINTS = "RAYFED_LORA_ENDPOINTS"
_ENVIRONMENT = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT")
_DEFAULT_PORTS = {"https": ":443", "http": ":80"}
_AZURE_OPTIONS = ("blob_storage_authority", "dfs_storage_authority")
_AZURE = ".core.windows.net"
_ANONYMOUS = {
    "s3": "anonymous=true",
    "abfs": "credential_kind=anonymous",
    "abfss": "credential_kind=anonymous",
}
# Keys of a recipe whose values may be URIs to open.
# The keys, and at the end the place in a list, that lead to a location in a recipe.
_Path = tuple[str | int, ...]
LOCATION_KEYS = ("data.source", "data.test_source", "clients.availability.trace", "storage.path")


def endpoint(location: str) -> str | None:
    """Return the server that a URI's options name, None for the store's own server.

    >>> endpoint("s3://bucket/a?endpoint_override=Host:9000&scheme=http")
    'http://host:9000'
    >>> endpoint("s3://bucket/a?region=eu-central-1")
    """
    if not is_uri(location):
        return None
    try:
        parts = urlsplit(location)
    except ValueError:  # not a valid URI: it cannot be opened
        return None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme in ("s3", "gs", "gcs"):
        host, scheme = options.get("endpoint_override", ""), options.get("scheme", "https")
        if parts.scheme == "s3" and not host and s3_endpoint() is not None:
            return None  # the environment gives host and scheme
        # Without encryption the network can read what is sent.
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
    """Return the URL of S3 in the environment, or None."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _normal(host: str, scheme: str) -> str:
    """Return scheme and host in lower case, without the scheme's default port."""
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
    option = _ANONYMOUS.get(parts.scheme)
    if option is None:
        return location
    name = option.partition("=")[0]
    others = [part for part in parts.query.split("&") if part and part.partition("=")[0] != name]
    return urlunsplit(parts._replace(query="&".join([*others, option])))


def guarded(location: str, named: Collection[str]) -> str:
    """Return a URI that sends no credentials to an endpoint that is not the user's own.

    `named` are endpoints that the user has named, in addition to those of the environment.

    >>> guarded("s3://bucket/a?endpoint_override=host:9000", ())
    's3://bucket/a?endpoint_override=host:9000&anonymous=true'
    >>> guarded("s3://bucket/a?endpoint_override=host:9000", ["https://host:9000"])
    's3://bucket/a?endpoint_override=host:9000'
    """
    server = endpoint(location)
    if server is None or server in named or server in own_endpoints():
        return location
    return _anonymised(location)


def unguarded(location: str) -> str:
    """Return a location without what `guarded` adds, for comparisons of locations."""
    if not is_uri(location) or endpoint(location) is None:
        return location
    plain, _, options = location.partition("?")
    added = ("", *_ANONYMOUS.values())
    rest = "&".join(part for part in options.split("&") if part not in added)
    plain = plain.replace("://anonymous@", "://", 1)
    return f"{plain}?{rest}" if rest else plain


def named_in(recipe: Mapping[str, Any]) -> frozenset[str]:
    """Return the endpoints in a recipe's nested values, or a part of them, that get credentials."""
    servers = (endpoint(value) for _, value in _locations(recipe) if not anonymous(value))
    return frozenset(server for server in servers if server is not None)


def guarded_in(recipe: Mapping[str, Any], named: Collection[str]) -> dict[str, Any]:
    """Return a recipe's values with every location guarded; see `guarded`."""
    result = dict(recipe)
    for path, value in _locations(recipe):
        result = _replaced(result, path, guarded(value, named))
    return result


def strangers_in(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield key and endpoint of each location whose requests are anonymous."""
    for path, value in _locations(recipe):
        server = endpoint(value)
        if server is not None and anonymous(value):
            yield ".".join(part for part in path if isinstance(part, str)), server


def _locations(recipe: Mapping[str, Any]) -> Iterator[tuple[_Path, str]]:
    for key in LOCATION_KEYS:
        found: Any = recipe
        path: _Path = ()
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                break
            found, path = found[part], (*path, part)
        # A trace may be a plain text in place of a section, a source a list.
        if isinstance(found, str):
            yield path, found
        elif isinstance(found, list):
            yield from (((*path, i), one) for i, one in enumerate(found) if isinstance(one, str))


def _replaced(values: Any, path: _Path, value: str) -> Any:
    if not path:
        return value
    first, rest = path[0], path[1:]
    inner = _replaced(values[first], rest, value)
    if isinstance(values, list):
        return [inner if i == first else other for i, other in enumerate(values)]
    return {**values, first: inner}
