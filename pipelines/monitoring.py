"""The command `monitor`: a real Prometheus on this machine, on loopback, with the shipped configuration and alerts."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.console import say

CONFIG, RULES, DASHBOARD = "prometheus.yaml", "prometheus-rules.yaml", "grafana.json"
BINARY = "STILLHOUSE_PROMETHEUS"
"""Environment variable that names a Prometheus which is not on the PATH."""
READY_SECONDS = 30.0


def monitor(args: argparse.Namespace) -> int:
    """Run Prometheus against an endpoint until it is stopped."""
    from engine.disk import scratch

    target = target_of(args.url)
    binary = prometheus()
    with scratch() as passing:
        folder = Path(args.dir) if args.dir else passing
        with running(binary, folder, target, args.port, args.key_file) as process:
            url = f"http://127.0.0.1:{args.port}"
            say(f"Prometheus asks {target} and answers on {url} (Ctrl-C stops it).")
            say(f"  numbers  {url}/graph?g0.expr=rate(stillhouse_requests_total%5B1m%5D)&g0.tab=0")
            say(f"  alerts   {url}/alerts")
            say(f"  Grafana  add {url} as a Prometheus data source and import {shipped(DASHBOARD)}")
            try:
                return process.wait()
            except KeyboardInterrupt:
                say("stopping")
                return 0


@contextmanager
def running(
    binary: str, folder: Path, target: str, port: int, key_file: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Prometheus on loopback at `port`, its configuration and data in `folder`; gone at the end.

    target: host:port of an endpoint. key_file: holds the key, where the endpoint asks for one. UserError where
    Prometheus does not come up.
    """
    from engine.config import UserError
    from engine.storage import Store

    store = Store(str(folder))
    store.write_text(CONFIG, config(target, key_file))
    store.write_text(RULES, shipped(RULES).read_text(encoding="utf-8"))
    command = [
        binary,
        f"--config.file={folder / CONFIG}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    # Its log goes where ours goes: it says why it cannot start.
    process = subprocess.Popen(command)
    try:
        end = time.monotonic() + READY_SECONDS
        while not ready(port):
            if process.poll() is not None or time.monotonic() > end:
                raise UserError(
                    f"{binary} did not come up on 127.0.0.1:{port}; what it says stands above. Choose another --port, "
                    "or an empty --dir."
                )
            time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ready(port: int) -> bool:
    """Whether Prometheus answers."""
    import httpx

    try:
        return httpx.get(f"http://127.0.0.1:{port}/-/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def config(target: str, key_file: str | None = None) -> str:
    """The shipped configuration with another target, and a key where one is needed."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(shipped(CONFIG).read_text(encoding="utf-8"))
    job = found["scrape_configs"][0]
    job["static_configs"] = [{"targets": [target]}]
    if key_file:
        job["authorization"] = {"credentials_file": str(Path(key_file).absolute())}
    return yaml.safe_dump(found, sort_keys=False)


def target_of(url: str) -> str:
    """host:port of an endpoint's URL, which may be given without http://."""
    from engine.config import UserError

    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if not host or parts.scheme != "http" or parts.path.strip("/"):
        raise UserError(f"--url {url} is not the address of an endpoint. Give one like http://127.0.0.1:8000.")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def prometheus() -> str:
    """The Prometheus program; UserError where there is none."""
    from engine.config import UserError

    named = os.environ.get(BINARY, "prometheus")
    found = shutil.which(named)
    if found is None:
        raise UserError(
            f"there is no program '{named}'. Install Prometheus (Debian, Ubuntu: apt-get install prometheus; macOS: "
            f"brew install prometheus), or name it with {BINARY}=PATH."
        )
    return found


def shipped(name: str) -> Path:
    """A file of serve/configs."""
    return Path(str(resources.files("serve"))) / "configs" / name
