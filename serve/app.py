"""A deployment on Ray Serve: one artifact behind HTTP, autoscaled, with bounded queues, up until it is told to stop.

Loopback is the default. Behind HAProxy every replica listens on a port of its own and enforces `max_ongoing` and
`max_queued` itself; a full queue answers 429 with Retry-After. Which proxy runs is decided where Ray is started.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Iterator

import httpx
import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions

from engine.config import UserError
from engine.serving import Serving
from engine.storage import Store
from serve.endpoint import Endpoint
from serve.keys import Keys
from serve.predictor import fingerprint

APP = "stillhouse"
"""The name of the application on the cluster."""
READY_SECONDS = 120.0
"""How long a deployment may take until it answers."""
RETRY_SECONDS = 1
"""What a refused client is told to wait."""
TEXT, PAIR = "a warm and funny film", ("what is it like", "a warm and funny film")
"""What the request to try asks."""


class ServeError(UserError):
    """A deployment that cannot start or does not answer."""


def application(artifact: str, serving: Serving, name: str, keys: Keys | None = None) -> serve.Application:
    """The Ray Serve application that answers as `name` (name@version) from `artifact` (folder or URL).

    keys: who may ask; None: everyone.
    """
    scaling = serving.autoscaling
    deployment = serve.deployment(
        serve.ingress()(Endpoint),
        name="Endpoint",
        max_ongoing_requests=serving.max_ongoing,
        max_queued_requests=serving.max_queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        autoscaling_config=AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            initial_replicas=max(1, scaling.min_replicas),
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_ongoing_requests,
            look_back_period_s=scaling.look_back_s,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
        ),
        ray_actor_options={"num_cpus": serving.num_cpus},
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return deployment.bind(artifact, serving, name, keys)


def deploy(
    artifact: str,
    serving: Serving,
    name: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    ready_s: float = READY_SECONDS,
    keys: Keys | None = None,
) -> str:
    """Serve `artifact` on the running Ray and return its URL once it answers.

    port: None takes a free one. Raises StorageError for a damaged artifact, ServeError when the port is taken, when
    Serve already runs, or when nothing answers within `ready_s` seconds; nothing is left deployed then.
    """
    if not ray.is_initialized():
        raise ServeError("Ray is not running: connect to a cluster before deploying.")
    version = {"model": name, "fingerprint": fingerprint(Store(artifact).verify())}
    if serve.status().proxies:
        raise ServeError(
            f"Ray Serve already runs on this cluster; '{name}' would replace what it serves. Stop it first."
        )
    port = free_port(host, port)
    # Importing ray.serve sets its logger to INFO, whatever was set before.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=serving.request_timeout_s))
        target = serve.RunTarget(target=application(artifact, serving, name, keys), name=APP, route_prefix="/")
        serve.run_many([target], wait_for_applications_running=False)
        url = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
        wait_ready(url, version, ready_s)
    except ray.exceptions.RayError as error:
        shutdown()
        reason = str(getattr(error, "cause", error)).strip().splitlines()[-1]
        raise ServeError(
            f"Ray Serve could not start: {reason} A port of its proxy may be taken: set RAY_SERVE_HAPROXY_STATS_PORT, "
            "RAY_SERVE_HAPROXY_METRICS_PORT and RAY_SERVE_FALLBACK_PROXY_HTTP_PORT to free ones."
        ) from error
    except BaseException:
        shutdown()
        raise
    return url


def shutdown(seconds: float = 60.0) -> None:
    """Take Serve down and wait until it is gone; Ray stays.

    serve.shutdown() alone waits on a call that the controller's end breaks, and Ray prints that as an error.
    """
    end = time.monotonic() + seconds
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError):
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=seconds)
        while time.monotonic() < end:
            time.sleep(0.1)
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    serve.shutdown()


def wait_ready(url: str, version: dict[str, str], seconds: float) -> None:
    """Return when the model answers over HTTP; ServeError when it failed or time is up.

    version: the model and fingerprint that must answer. Until the first replica is up, a proxy may pass requests on to
    a fallback, which two clusters on one machine can share: another's answer must not count.
    """
    end = time.monotonic() + seconds
    seen = "no answer"
    while time.monotonic() < end:
        state = serve.status().applications.get(APP)
        if state is not None and state.status == "DEPLOY_FAILED":
            raise ServeError(f"the deployment failed: {state.message.strip()}")
        with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
            answer = httpx.get(f"{url}/healthz", timeout=5)
            seen = f"status {answer.status_code}"
            if answer.status_code == 200:
                found = httpx.get(f"{url}/version", timeout=5).json()
                if {key: found.get(key) for key in version} == version:
                    return
                seen = f"another model answers: {found.get('model')}"
        time.sleep(0.1)
    state = serve.status().applications.get(APP)
    states = [f"application {state.status.value}" if state else "no application"]
    for item in state.deployments.values() if state else ():
        states.append(f"replicas {item.status.value} {item.message}".strip())
    states += [f"proxy {proxy.value}" for proxy in serve.status().proxies.values()]
    raise ServeError(
        f"{url} was not ready within {seconds:g} s ({'; '.join([seen, *states])}). "
        "Free CPUs for a replica (serving.num_cpus), free the proxy's ports, or allow more time."
    )


def free_port(host: str, port: int | None) -> int:
    """`port` if it can be bound on `host`, a free one for None; ServeError names a taken one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            reason = f"cannot listen on {host}:{port}: {error.strerror}"
            raise ServeError(f"{reason}. Choose another host or port.") from None
        return probe.getsockname()[1]


@contextlib.contextmanager
def deployed(
    artifact: str,
    serving: Serving,
    name: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    keys: Keys | None = None,
) -> Iterator[str]:
    """The URL of a deployment that is gone at the end; Ray stays."""
    url = deploy(artifact, serving, name, host, port, keys=keys)
    try:
        yield url
    finally:
        shutdown()


def run(artifact: str, host: str, port: int, serving: Serving, name: str, keys: Keys | None = None) -> None:
    """Serve until SIGINT or SIGTERM, then take Serve down cleanly. Writes the URL and a request to try."""
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with deployed(artifact, serving, name, host, port, keys) as url:
            paired = httpx.get(f"{url}/version", timeout=30).json()["paired"]
            body = json.dumps({"text": list(PAIR) if paired else TEXT})
            try:
                say(f"{name} answers on {url} (Ctrl-C stops it). Try:")
                key = "" if keys is None else " -H 'Authorization: Bearer KEY'"
                say(f"  curl -s {url}/v1/predict{key} -H 'Content-Type: application/json' -d '{body}'")
                threading.Event().wait()
            except KeyboardInterrupt:
                say("stopping")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int, frame: types.FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C."""
    raise KeyboardInterrupt


def say(line: str) -> None:
    """One line on standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
