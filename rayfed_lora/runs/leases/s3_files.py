"""Lease files on S3, by boto3: pyarrow's filesystem has no conditional writes.

Source: this project; Amazon S3 User Guide, "Conditional requests".
"""

from __future__ import annotations

from typing import Any

from pyarrow import fs

from rayfed_lora.runs.leases.lease_files import file_name


class NoConditionalWritesError(OSError):
    """The object store rejects conditional requests."""


class S3Files:
    """Lease files, see `MountedFiles`: If-None-Match to create, If-Match to rewrite and remove."""

    remote = True
    note: str | None = None

    def __init__(self, filesystem: fs.S3FileSystem, path: str) -> None:
        """Make a client with the endpoint, region and credentials of the filesystem."""
        self._bucket, _, folder = path.partition("/")
        self._prefix = f"{folder}/" if folder else ""
        self._client = s3_client(filesystem)
        self._tags: dict[int, str] = {}

    def read(self, number: int) -> bytes | None:
        """Return a file's content, None where the file is gone."""
        answer = self._request("get_object", number)
        if answer is None:
            return None
        self._tags[number] = answer["ETag"]
        return bytes(answer["Body"])

    def create(self, number: int, content: bytes) -> bool:
        """Create a file; return False, and change nothing, where it exists."""
        # A request that was repeated because its answer was lost finds its own file.
        return self._put(number, content, IfNoneMatch="*") or self.read(number) == content

    def rewrite(self, number: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new`; False where the file is gone or differs."""
        if number not in self._tags and self.read(number) != old:
            return False
        return self._put(number, new, IfMatch=self._tags[number])

    def remove(self, number: int) -> None:
        """Remove a file if it is unchanged since this object read or wrote it."""
        condition = {"IfMatch": self._tags.pop(number)} if number in self._tags else {}
        try:
            self._request("delete_object", number, **condition)
        except NoConditionalWritesError:
            # Some stores support conditions for writes only.
            self._request("delete_object", number)

    def _put(self, number: int, content: bytes, **condition: str) -> bool:
        answer = self._request("put_object", number, Body=content, **condition)
        if answer is None:
            return False
        self._tags[number] = answer["ETag"]
        return True

    def _request(self, operation: str, number: int, **arguments: Any) -> dict[str, Any] | None:
        """Return the answer, its body read; None where the file is gone or a condition failed."""
        from botocore.exceptions import BotoCoreError, ClientError

        key = self._prefix + file_name(number)
        try:
            call = getattr(self._client, operation)
            answer: dict[str, Any] = call(Bucket=self._bucket, Key=key, **arguments)
            return answer | {"Body": answer["Body"].read()} if "Body" in answer else answer
        except BotoCoreError as error:
            raise OSError(str(error)) from error
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = error.response.get("Error", {}).get("Code")
            if code == "NotImplemented" or status == 501:
                raise NoConditionalWritesError(str(error)) from error
            # 409: another conditional write of the same object was in progress.
            if code == "NoSuchBucket" or status not in (404, 409, 412):
                raise OSError(str(error)) from error
            return None


def s3_client(filesystem: fs.S3FileSystem) -> Any:
    """Return a boto3 client of the store of a pyarrow filesystem, with the same credentials.

    The options are read from the filesystem's pickled form, its only complete description. Missing
    keys come from boto3's default chain, which is that of pyarrow's SDK.
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
        # Stores other than Amazon's may not support the newer checksums.
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
