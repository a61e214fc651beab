"""A local S3 server (moto) over the real protocol, whose requests can be made to fail."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest
from pyarrow import fs

# Of the server's own making; in the environment before Ray starts processes.
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "not/a+secret",
    # No look for a role of this machine.
    "AWS_EC2_METADATA_DISABLED": "true",
}
_numbers = count()
Request = tuple[str, str]


@dataclass
class ObjectStore:
    """A server with one bucket a test.

    Attributes:
        port: of the server on this machine.
        requests: method and path with query of each request so far.
        signed: whether each of them carried credentials.
    """

    port: int = 0
    requests: list[Request] = field(default_factory=list)
    signed: list[bool] = field(default_factory=list)
    _refuse: Callable[[str, str], bool] = lambda method, url: False
    _conditional: Any = field(default_factory=threading.Lock)

    def application(self, inner: Any) -> Any:
        """Return a WSGI application that answers 403 where a request is to fail."""

        def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
            request = environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}"
            self.requests.append(request)
            self.signed.append("HTTP_AUTHORIZATION" in environ)
            if self._refuse(*request):
                start("403 Forbidden", [("Content-Length", "0")])
                return []
            if {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys():
                # moto looks and writes in two steps.
                with self._conditional:
                    return inner(environ, start)
            return inner(environ, start)

        return answer

    @contextmanager
    def refusing(self, refuse: Callable[[str, str], bool]) -> Iterator[None]:
        """Let the requests fail whose method and path with query are to be refused."""
        self._refuse = refuse
        try:
            yield
        finally:
            self._refuse = lambda method, url: False

    @property
    def options(self) -> str:
        """The options of a URI of this server."""
        return f"endpoint_override=127.0.0.1:{self.port}&scheme=http&region=us-east-1"

    def bucket(self) -> Bucket:
        """Make a bucket."""
        name = f"bucket-{next(_numbers)}"
        filesystem, _ = fs.FileSystem.from_uri(f"s3://b?{self.options}&allow_bucket_creation=true")
        filesystem.create_dir(name)
        return Bucket(self, name, filesystem)


@dataclass(frozen=True)
class Bucket:
    """A bucket of its own for a test."""

    store: ObjectStore
    name: str
    filesystem: fs.S3FileSystem

    def uri(self, path: str) -> str:
        """Return the URI of a folder or file in it."""
        return f"s3://{self.name}/{path}?{self.store.options}"

    def keys(self, path: str = "") -> list[str]:
        """Return the names of all objects, but for marks of folders."""
        selector = fs.FileSelector(f"{self.name}/{path}", recursive=True, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return sorted(info.path.removeprefix(f"{self.name}/") for info in found if info.is_file)


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """Serve S3 on a free port until the block is left."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ObjectStore()
    inner = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, store.application(inner), threaded=True)
    store.port = server.port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    with serving() as store:
        yield store


@pytest.fixture
def bucket(object_store: ObjectStore) -> Bucket:
    return object_store.bucket()
