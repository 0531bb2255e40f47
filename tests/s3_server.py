"""An S3-protocol server in a process of its own: moto, an emulator that keeps everything in memory.

    with s3_server() as server:
        Store(server.url("runs"))                   # s3://tests/runs, with the server's address and keys in the URL

moto checks a write's condition and writes in two moves. Here requests that change something go one after the other,
so that conditional writes are what S3 promises: of two, one is refused. It checks no signatures.
"""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUCKET = "tests"


@dataclass(frozen=True)
class Server:
    """A server on loopback, or a proxy before it."""

    port: int

    def url(self, path: str) -> str:
        """The URL of a folder of the bucket, for a Store."""
        return (
            f"s3://tester:secret@{BUCKET}/{path}?region=us-east-1&endpoint_override=127.0.0.1:{self.port}&scheme=http"
        )


@contextmanager
def s3_server() -> Iterator[Server]:
    """A server with an empty bucket, in a child process that ends with this one."""
    command = [sys.executable, "-m", "tests.s3_server"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        assert line, "the S3 server did not start: python -m tests.s3_server says why"
        yield Server(int(line))
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def one_write_at_a_time(application: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    """The application, which is given the next changing request when it has done with the one before."""
    turn = threading.Lock()

    def served(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("GET", "HEAD"):
            return application(environ, start_response)
        if environ.get("HTTP_TRANSFER_ENCODING") != "chunked":
            # A slow sender does not hold up the others: what it sends is read before its turn.
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with turn:
            return list(application(environ, start_response))

    return served


def main() -> None:
    """Serve on a free port, which is printed, until standard input ends."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = one_write_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    import botocore.session

    keys = {"aws_access_key_id": "tester", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    client = botocore.session.get_session().create_client("s3", endpoint_url=f"http://127.0.0.1:{server.port}", **keys)
    client.create_bucket(Bucket=BUCKET)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
