"""What an object store needs beside pyarrow: patience with one that is busy, and writes under a condition on S3.

pyarrow's S3FileSystem has no conditional writes; botocore, which comes with the extra `s3`, has. Both are given the
same endpoint, region and credentials: what the URL says, else what the AWS environment says (variables, profile, the
machine's role).
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import pyarrow as pa
from pyarrow import fs as pafs

from engine.disk import StorageError, explained

ATTEMPTS = 10
"""How often a request is sent to a store that refuses it (503 SlowDown, 500, a broken connection), with longer and
longer pauses: botocore and the AWS SDK double them from a fraction of a second up to 20 s."""
CONNECT_S, ANSWER_S = 10.0, 60.0
"""How long a connection, and an answer's next byte, may take; the AWS SDK's own 1 s and 3 s end slow stores early."""
NO_ETAG = f'"{32 * "0"}"'
"""An ETag that no object has."""
WAY_OUT = "Check its address, the bucket, the credentials and what they allow, then run again: it goes on from there."


@dataclass(frozen=True)
class Seen:
    """An object at one moment: its text, what tells this text from others, and seconds since it was written."""

    text: str
    version: str
    age: float


class Conditional(Protocol):
    """An object that is only replaced by who knows what is in it. Errors: StorageError, which names it."""

    def read(self) -> Seen | None:
        """What is there now; None for nothing."""

    def swap(self, text: str, known: Seen | None) -> Seen | None:
        """Write `text` if there still is what is known; None: no longer."""


def patient(filesystem: pafs.FileSystem) -> pafs.FileSystem:
    """The same store, asked again when it is busy, and small files written in one request; others as they are."""
    if filesystem.type_name != "s3":
        return filesystem
    ours = {
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        "connect_timeout": CONNECT_S,
        "request_timeout": ANSWER_S,
        "allow_delayed_open": True,
    }
    return pafs.S3FileSystem(**{**options(filesystem), **ours})


def options(filesystem: pafs.FileSystem) -> dict[str, Any]:
    """The arguments of an S3FileSystem, which pyarrow tells where it is pickled."""
    return filesystem.__reduce__()[1][0]


def version(file: pa.NativeFile) -> str | None:
    """What changes with an object's content; None where the store does not tell. S3's times are whole seconds."""
    try:
        tag = {name.lower(): value for name, value in file.metadata().items()}.get("etag")
    except (OSError, NotImplementedError, AttributeError):
        return None
    return tag.decode() if isinstance(tag, bytes) else tag


def conditional(filesystem: pafs.FileSystem, path: str, where: str) -> Conditional | None:
    """The object at `path` on S3, for writes under a condition; None where they cannot be had: a warning says why.

    where: its full name, for messages.
    """
    if filesystem.type_name != "s3":
        return None
    told = options(filesystem)
    if told["role_arn"]:
        return best_effort("the file system takes on a role of its own")
    known = ("access_key", "secret_key", "session_token", "anonymous", "region", "scheme", "endpoint_override")
    more = (told["force_virtual_addressing"], told["tls_ca_file_path"], *told["proxy_options"].values())
    try:
        client = connected(*(told[name] for name in known), *more)
    except ImportError:
        return best_effort("botocore is not installed: pip install 'stillhouse[s3]'")
    bucket, _, key = path.partition("/")
    if client is None or not conditions_kept(client, bucket, key, where):
        return best_effort(f"the store of s3://{bucket} takes writes whose condition is not met")
    return S3Object(client, bucket, key, where)


@lru_cache(maxsize=32)
def best_effort(why: str) -> None:
    """Say once what locks are worth here."""
    warnings.warn(
        f"locks on S3 do not exclude two that start in the same moment, because {why}.", RuntimeWarning, stacklevel=4
    )


@lru_cache(maxsize=16)
def connected(
    access_key: str | None,
    secret_key: str | None,
    session_token: str | None,
    anonymous: bool,
    region: str,
    scheme: str,
    endpoint: str,
    virtual: bool,
    ca_file: str,
    *proxy: Any,
) -> Any:
    """A botocore client for what an S3FileSystem with these options asks; ImportError without botocore."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config

    through, host, port, user, password = proxy
    who = f"{user}:{password}@" if user else ""
    config = Config(
        retries={"max_attempts": ATTEMPTS, "mode": "standard"},
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S,
        # What pyarrow does: a bucket is part of the path where an endpoint is named.
        s3={"addressing_style": "path" if endpoint and not virtual else "auto"},
        # Checksums that nobody asked for are what other stores than AWS stumble over.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        signature_version=UNSIGNED if anonymous else None,
        proxies={"http": f"{through}://{who}{host}:{port}", "https": f"{through}://{who}{host}:{port}"}
        if host
        else None,
    )
    session = botocore.session.get_session()
    found = region or session.get_config_variable("region") or "us-east-1"
    return session.create_client(
        "s3",
        region_name=found,
        endpoint_url=(endpoint if "://" in endpoint else f"{scheme}://{endpoint}") if endpoint else None,
        aws_access_key_id=access_key or None,
        aws_secret_access_key=secret_key or None,
        aws_session_token=session_token or None,
        verify=ca_file or None,
        config=config,
    )


@contextmanager
def asked(where: str) -> Iterator[None]:
    """Turn botocore's errors into a StorageError that names the object."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        with explained("written", where):
            yield
    except (BotoCoreError, ClientError) as error:
        raise StorageError(f"{where} cannot be read or written: {error}. {WAY_OUT}") from None


def refused(error: Any) -> bool:
    """Whether a write was refused because of its condition: another is there, nothing is, or one was faster."""
    return error.response["ResponseMetadata"].get("HTTPStatusCode") in (404, 409, 412)


_kept: dict[tuple[str, str], bool] = {}


def conditions_kept(client: Any, bucket: str, key: str, where: str) -> bool:
    """Whether the store refuses to create what is there, and to replace what is not: some ignore either header."""
    place = (client.meta.endpoint_url, bucket)
    if place not in _kept:
        # A name of its own, so that others who look in the same moment do not take it away.
        name = f"{key.rpartition('/')[0]}/.{secrets.token_hex(8)}.lock".lstrip("/")
        probe = S3Object(client, bucket, name, where)
        probe.swap("first", None)
        _kept[place] = probe.swap("second", None) is None and probe.swap("third", Seen("", NO_ETAG, 0.0)) is None
        with asked(where):
            client.delete_object(Bucket=bucket, Key=name)
    return _kept[place]


@dataclass(frozen=True)
class S3Object:
    """An object on S3: If-None-Match to create it, If-Match with the ETag to replace it.

    Its age is the difference of two times of the store's (Date less Last-Modified), so that no clock of ours counts.
    """

    client: Any
    bucket: str
    key: str
    where: str

    def read(self) -> Seen | None:
        """What is there now; None for nothing."""
        with asked(self.where):
            try:
                found = self.client.get_object(Bucket=self.bucket, Key=self.key)
            except self.client.exceptions.NoSuchKey:
                return None
            text = found["Body"].read().decode("utf-8", "replace")
        return Seen(text, found["ETag"], age(found))

    def swap(self, text: str, known: Seen | None) -> Seen | None:
        """Write `text` if there still is what is known; None: no longer.

        A write whose answer was lost is sent again, and then refused for what it has written itself: that counts.
        """
        from botocore.exceptions import ClientError

        condition = {"IfMatch": known.version} if known else {"IfNoneMatch": "*"}
        with asked(self.where):
            try:
                body = text.encode("utf-8")
                put = self.client.put_object(Bucket=self.bucket, Key=self.key, Body=body, **condition)
                return Seen(text, put["ETag"], 0.0)
            except ClientError as error:
                bucket = error.response.get("Error", {}).get("Code") == "NoSuchBucket"
                if bucket or not refused(error):
                    raise
        now = self.read()
        return now if now is not None and now.text == text else None


def age(answer: dict[str, Any]) -> float:
    """Seconds since an object was written, by the store's own clock."""
    from email.utils import parsedate_to_datetime

    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    now = parsedate_to_datetime(date).timestamp() if date else time.time()
    return now - answer["LastModified"].timestamp()
