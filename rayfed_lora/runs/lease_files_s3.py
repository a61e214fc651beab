"""Lease files on S3, by boto3: pyarrow's filesystem has no conditional writes.

Source: this project; Amazon S3 User Guide, "Conditional requests".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyarrow import fs

from rayfed_lora.runs.lease_files import NoConditionalWritesError, file_name, numbers_in


class S3Files:
    """On S3: conditional writes, If-None-Match to create and If-Match to rewrite and remove."""

    remote = True
    note: str | None = None

    def __init__(self, filesystem: fs.S3FileSystem, path: str) -> None:
        """Make a client with the endpoint, region and credentials of the filesystem."""
        self._bucket, _, folder = path.partition("/")
        self._prefix = f"{folder}/" if folder else ""
        self._client = s3_client(filesystem)
        self._tags: dict[int, str] = {}

    def numbers(self) -> list[int]:
        """Return the numbers of all files, ascending."""
        with _as_os_errors():
            prefix = f"{self._prefix}.owner-"
            answer = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix)
        keys = [entry["Key"] for entry in answer.get("Contents", ())]
        return numbers_in([key.rpartition("/")[2] for key in keys])

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where it is gone."""
        content: bytes | None = None

        def ask() -> None:
            nonlocal content
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key(number))
            content, self._tags[number] = answer["Body"].read(), answer["ETag"]

        self._held(ask)
        return content

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it is there.

        Raises:
            NoConditionalWritesError: the store refuses conditions.
        """
        # A request that was repeated for want of an answer finds its own file.
        return self._put(number, content, IfNoneMatch="*") or self.read(number) == content

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`; False where the file is gone or differs."""
        if number not in self._tags and self.read(number) != old:
            return False
        return self._put(number, new, IfMatch=self._tags[number])

    def remove(self, number: int) -> None:
        """Remove a file as this object read or wrote it last."""
        where = {"Bucket": self._bucket, "Key": self._key(number)}
        condition = {"IfMatch": self._tags.pop(number)} if number in self._tags else {}
        try:
            self._held(lambda: self._client.delete_object(**where, **condition))
        except NoConditionalWritesError:
            # Some stores know conditions of writes only.
            self._held(lambda: self._client.delete_object(**where))

    def tidy(self) -> None:
        """Do nothing: an object store has no folders."""

    def _put(self, number: int, content: bytes, **condition: str) -> bool:
        def ask() -> None:
            answer = self._client.put_object(
                Bucket=self._bucket, Key=self._key(number), Body=content, **condition
            )
            self._tags[number] = answer["ETag"]

        return self._held(ask)

    def _held(self, ask: Callable[[], object]) -> bool:
        """Make a request; return False where its condition does not hold."""
        from botocore.exceptions import ClientError

        with _as_os_errors():
            try:
                ask()
            except ClientError as error:
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                code = error.response.get("Error", {}).get("Code")
                if code == "NotImplemented" or status == 501:
                    raise NoConditionalWritesError(str(error)) from error
                # 409: another conditional write of the same object was under way.
                if code == "NoSuchBucket" or status not in (404, 409, 412):
                    raise
                return False
            return True

    def _key(self, number: int) -> str:
        return self._prefix + file_name(number)


def s3_client(filesystem: fs.S3FileSystem) -> Any:
    """Return boto3's client of the same store, with the same credentials, as pyarrow's filesystem.

    The options come from what the filesystem is pickled as, its only complete description. Keys
    that it does not name come from boto3's default chain, which is that of pyarrow's SDK.
    """
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    options = filesystem.__reduce__()[1][0]
    endpoint, anonymous = options["endpoint_override"], options["anonymous"]
    config = Config(
        connect_timeout=5,
        read_timeout=10,
        retries={"total_max_attempts": 3, "mode": "standard"},
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Stores other than Amazon's may not know the newer checksums.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        **({"signature_version": UNSIGNED} if anonymous else {}),
    )
    return boto3.session.Session().client(
        "s3",
        region_name=options["region"] or None,
        endpoint_url=f"{options['scheme']}://{endpoint}" if endpoint else None,
        aws_access_key_id=options["access_key"] or None,
        aws_secret_access_key=options["secret_key"] or None,
        aws_session_token=options["session_token"] or None,
        verify=options.get("tls_ca_file_path") or None,
        config=config,
    )


@contextmanager
def _as_os_errors() -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise OSError(str(error)) from error
