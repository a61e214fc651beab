"""pyarrow filesystems of paths and URIs. Source: this project."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow import fs

from rayfed_lora.endpoints import anonymous, s3_endpoint
from rayfed_lora.errors import RunFolderError
from rayfed_lora.locations import check_name, holds_secret, is_uri, repeated_option

# Options of an S3 URI: pyarrow's, and `anonymous`, which `endpoints` adds.
_S3_OPTIONS = ("region", "endpoint_override", "scheme", "tls_ca_file_path")
_ANONYMOUS = "anonymous"
_S3_HINT = (
    "credentials come from the environment, ~/.aws or the machine's role; region and endpoint from"
    " ?region=...&endpoint_override=...&scheme=http in the URI, or AWS_ENDPOINT_URL"
)
_ANONYMOUS_HINT = (
    "requests to this endpoint carry no credentials, since only the recipe names it:"
    " AWS_ENDPOINT_URL_S3, RAYFED_LORA_ENDPOINTS, --out or --set names it as yours"
)
# A region becomes a part of a host name.
_REGION = re.compile(r"[A-Za-z0-9-]*")
# A store that does not answer fails after about ten seconds.
_S3_ATTEMPTS = 3


def open_filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a path or URI, and the path in it; raises OSError, ValueError."""
    if "\0" in location:
        raise ValueError("expected a path or URI without NUL characters")
    if re.search("[\ud800-\udfff]", location):
        raise ValueError("expected a path in UTF-8; PYTHONUTF8=1 makes Python read names as UTF-8")
    if not is_uri(location):
        return fs.LocalFileSystem(), os.path.abspath(location)
    if "#" in location:
        raise ValueError("expected a URI without '#', after which names would be lost")
    repeated = repeated_option(location)
    if repeated is not None:
        raise ValueError(f"expected each option of a URI once, got {repeated!r} more than once")
    parts = urlsplit(location)
    path = unquote(parts.path).strip("/")
    check_name(path)
    if parts.scheme == "s3":
        return _s3(parts.netloc, parts.query, s3_endpoint()), f"{parts.netloc}/{path}"
    return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]


@lru_cache
def _s3(bucket: str, query: str, endpoint: str | None) -> fs.S3FileSystem:
    """Return what pyarrow returns for such a URI, but with fewer attempts for each request."""
    options: dict[str, Any] = {}
    if query:
        options |= parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    unknown = options.keys() - {*_S3_OPTIONS, _ANONYMOUS}
    if unknown or not bucket:
        raise ValueError(
            f"expected s3://bucket/folder with options of {', '.join(_S3_OPTIONS)};"
            f" got {', '.join(sorted(unknown)) or 'no bucket'}"
        )
    if _ANONYMOUS in options:
        if options[_ANONYMOUS] not in ("true", "false"):
            raise ValueError(f"expected anonymous=true or false, got {options[_ANONYMOUS]}")
        options[_ANONYMOUS] = options[_ANONYMOUS] == "true"
    if not _REGION.fullmatch(options.get("region", "")):
        raise ValueError(f"expected a region such as eu-central-1, got {options['region']!r}")
    if not options.get("endpoint_override"):
        # An empty option names no server, for pyarrow and for `endpoints.endpoint`.
        options.pop("endpoint_override", None)
    if endpoint and "endpoint_override" not in options:
        url = urlsplit(endpoint)
        options |= {"endpoint_override": url.netloc, "scheme": url.scheme}
    if "region" not in options and "endpoint_override" not in options:
        options["region"] = fs.resolve_s3_region(bucket)
    options["retry_strategy"] = fs.AwsStandardS3RetryStrategy(max_attempts=_S3_ATTEMPTS)
    try:
        # A small file is then sent in one request instead of three.
        return fs.S3FileSystem(allow_delayed_open=True, **options)
    except TypeError:  # an older pyarrow
        return fs.S3FileSystem(**options)


def refuse_secrets(location: str) -> None:
    """Raise a RunFolderError, which does not repeat them, where a location has credentials in it.

    The location of a run folder is stored and shown.
    """
    if holds_secret(location):
        raise RunFolderError(
            "run folder: expected a URI without credentials, which would be kept with the run;"
            f" {_S3_HINT}"
        )


def credentials_hint(location: str, filesystem: fs.FileSystem) -> str:
    """Return what an error about a location says about its credentials, "" for a local path."""
    if anonymous(location):
        return f" ({_ANONYMOUS_HINT})"
    return f" ({_S3_HINT})" if isinstance(filesystem, fs.S3FileSystem) else ""
