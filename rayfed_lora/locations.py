"""Paths and URIs of folders and files, as text; `storage` opens files. Source: this project."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import parse_qsl, quote, urlsplit

# Names of URI parameters with a secret, for all object stores.
_SECRET = r"[\w-]*(?:secret|passw|token|credential|signature|key)[\w-]*|sig"
_SECRETS = (
    # Up to the last @: a secret may contain slashes that should have been quoted.
    re.compile(r"\b(s3://)[^\s'\"]*@", re.IGNORECASE),
    re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s'\"/@]*:[^\s'\"@]*@", re.IGNORECASE),
    re.compile(rf"([?&](?:{_SECRET})=)[^\s'\"&]+", re.IGNORECASE),
)


def is_uri(location: str) -> bool:
    """Return whether a location is a URI, not a path.

    >>> is_uri("s3://bucket/runs"), is_uri("/data/runs")
    (True, False)
    """
    return "://" in location


def each(source: str | Sequence[str] | None) -> list[str]:
    """Return the locations of a key that holds one, several or none.

    >>> each("a.csv"), each(["a.csv", "b.csv"]), each(None)
    (['a.csv'], ['a.csv', 'b.csv'], [])
    """
    return [source] if isinstance(source, str) else [*(source or ())]


def child(location: str, *names: str) -> str:
    """Return the location of a file or folder inside a folder; URI options stay at the end.

    >>> child("runs/a/", "trials", "7")
    'runs/a/trials/7'
    >>> child("s3://bucket/a?region=eu-central-1", "report.html")
    's3://bucket/a/report.html?region=eu-central-1'

    Raises:
        ValueError: a name leads out of the folder.
    """
    for name in names:
        check_name(name)
    if not is_uri(location):
        return "/".join([location.rstrip("/"), *names])
    folder, mark, options = location.partition("?")
    return "/".join([folder.rstrip("/"), *map(quote, names)]) + mark + options


def parent(location: str) -> tuple[str, str]:
    """Return the folder that holds a file, and the file's name in it; undoes `child`.

    >>> parent("report.html"), parent("/a/report.html")
    (('.', 'report.html'), ('/a', 'report.html'))
    >>> parent("s3://bucket/a/report.html?scheme=http")
    ('s3://bucket/a?scheme=http', 'report.html')
    """
    path, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    folder, slash, name = path.rpartition("/")
    return (folder or slash or ".") + mark + options, name


def pattern_start(location: str) -> tuple[str, list[str]] | None:
    """Return the folder before the first wildcard and the parts after it, None without any.

    >>> pattern_start("s3://bucket/a/*/rows-[0-9].csv?region=eu-central-1")
    ('s3://bucket/a?region=eu-central-1', ['*', 'rows-[0-9].csv'])
    >>> pattern_start("*.csv"), pattern_start("a.csv")
    (('.', ['*.csv']), None)
    """
    # In a URI, options follow a question mark.
    path, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), None)
    if first is None:
        return None
    folder = "/".join(parts[:first]) or ("/" if first > 0 else ".")
    return folder + mark + options, parts[first:]


def check_name(name: str) -> None:
    r"""Check that a name does not lead out of its folder.

    Raises:
        ValueError: it is absolute, goes up, or has a character that is not allowed.

    >>> check_name("checkpoints/round-000003/state.json")
    >>> check_name("adapter/../../.bashrc")
    Traceback (most recent call last):
    ValueError: expected a name inside the folder, got 'adapter/../../.bashrc'
    """
    unsafe = name.startswith("/") or ".." in name.split("/") or "\\" in name or "\0" in name
    if unsafe:
        raise ValueError(f"expected a name inside the folder, got {name!r}")


def repeated_option(location: str) -> str | None:
    """Return an option that a URI has more than once, or None: readers differ in which they use.

    >>> repeated_option("gs://bucket/a?scheme=http&%73cheme=https")
    'scheme'
    >>> repeated_option("gs://bucket/a?scheme=http")
    """
    try:
        query = urlsplit(location).query if is_uri(location) else ""
    except ValueError:  # not a valid URI: it cannot be opened
        return None
    names = [name for name, _ in parse_qsl(query, keep_blank_values=True)]
    return next((name for name in names if names.count(name) > 1), None)


def holds_secret(location: str) -> bool:
    """Return whether a location contains credentials.

    >>> holds_secret("s3://bucket/runs?region=eu-central-1")
    False
    >>> holds_secret("s3://AKIA:secret@bucket/runs"), holds_secret("gs://b/a?access_token=x")
    (True, True)
    """
    if not is_uri(location):
        return False
    scheme, _, rest = location.partition("://")
    authority = rest.partition("?")[0].partition("/")[0]
    user, at, _ = authority.rpartition("@")
    # An S3 bucket has neither; in other stores a container or a user may precede the @.
    if ":" in user or (scheme.lower() == "s3" and (at or ":" in authority)):
        return True
    names = [name for name, _ in parse_qsl(urlsplit(location).query, keep_blank_values=True)]
    return any(re.fullmatch(_SECRET, name, re.IGNORECASE) for name in names)


def without_secrets(text: str) -> str:
    """Return a text with the credentials of all URIs in it masked.

    >>> without_secrets("cannot open s3://AKIA:se/cret@bucket/runs?x_token=abc&region=eu")
    'cannot open s3://***@bucket/runs?x_token=***&region=eu'
    """
    for pattern in _SECRETS:
        text = pattern.sub(lambda found: f"{found[1]}***{'' if found[1][-1] == '=' else '@'}", text)
    return text
