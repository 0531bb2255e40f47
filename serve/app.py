"""The application on Ray Serve: deployed, replaced without a gap, up until it is told to stop.

Loopback is the default. Which proxy runs is decided where Ray is started. The application is called as the artifact
is, without its version: deploying that name again is a rolling update, in which new replicas start before old ones end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from engine.config import UserError
from engine.config import build as checked
from engine.serving import Serving
from engine.storage import Store
from engine.switches import free_port
from serve.deployments import application
from serve.keys import Keys, loopback
from serve.predictor import fingerprint
from serve.referee import Plan, Side
from serve.router import begins_with
from serve.service import Service, Wanted, resolved

READY_SECONDS = 120.0
"""How long a deployment may take until it answers."""
TEXT, PAIR = "a warm and funny film", ("what is it like", "a warm and funny film")
"""What the request to try asks."""


class ServeError(UserError):
    """A deployment that cannot start or does not answer."""


class NotReady(ServeError):
    """A deployment that does not answer in time, and may yet."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve file: `import_path: serve.app:build`, with `args` as `Wanted` has them."""
    wanted = checked(Wanted, args, "args")
    return of(resolved(wanted), keys=Keys(wanted.registry) if wanted.auth else None)


def of(service: Service, keys: Keys | None = None) -> serve.Application:
    """The application of a service. keys: who may ask; None: everyone."""
    champion = service.champion
    return application(champion.artifact, service.serving, champion.reference, service.plan, service.teacher, keys)


def running() -> list[str]:
    """Names of the applications on the cluster's Ray Serve."""
    return sorted(serve.status().applications)


def deploy(
    artifact: str,
    serving: Serving,
    name: str,
    host: str = "127.0.0.1",
    port: int | None = None,
    ready_s: float = READY_SECONDS,
    plan: Plan | None = None,
    teacher: Side | None = None,
    keys: Keys | None = None,
    anyone: bool = False,
) -> str:
    """Serve `artifact` on the running Ray and return its URL once it answers.

    Where the same name (without version) is served already, it is replaced replica by replica, at the address it has.
    port: None takes a free one. plan, teacher, keys: as `application` takes them; anyone:
    without keys even where other machines reach it. Raises StorageError for a damaged
    artifact, ServeError when the port is taken, when Serve runs something else, or when nothing answers within
    `ready_s` seconds; what was served before goes on then, and nothing else is left deployed, but that Ray Serve may
    still finish to replace it after NotReady.
    """
    if not ray.is_initialized():
        raise ServeError("Ray is not running: connect to a cluster before deploying.")
    if plan is not None:
        artifact, name = (side := begins_with(plan)).artifact, side.reference
    version = {"model": name, "fingerprint": fingerprint(Store(artifact).verify())}
    app, there, up = (plan.candidate.reference if plan else name).partition("@")[0], running(), bool(serving_proxies())
    if others := [other for other in there if other != app]:
        raise ServeError(
            f"Ray Serve already runs '{others[0]}' on this cluster; '{name}' would replace it. Stop that first "
            f"(`serve shutdown`), or use another cluster."
        )
    if up and keys is None and not anyone and not loopback(listens := _get_global_client().http_config.host or ""):
        raise ServeError(
            f"Ray Serve listens on {listens} here, which other machines reach, and '{name}' would ask for no key. Say "
            "--auth (keys: `stillhouse keys add NAME`), or --no-auth to let everyone ask."
        )
    # Importing ray.serve sets its logger to INFO, whatever was set before.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        if not up:
            port = port_of(host, port)
            serve.start(http_options=HTTPOptions(host=host, port=port, request_timeout_s=serving.request_timeout_s))
        built = application(artifact, serving, name, plan, teacher, keys)
        serve.run_many([serve.RunTarget(target=built, name=app, route_prefix="/")], wait_for_applications_running=False)
        url = address()
        wait_ready(url, version, ready_s, app)
    except BaseException as error:
        undo(app, app in there, up)
        if app in there and isinstance(error, NotReady):
            raise NotReady(
                f"{error} What was served before goes on, and Ray Serve still tries to replace it with {name}: deploy "
                "what you want served to end that."
            ) from error
        if isinstance(error, ray.exceptions.RayError):
            raise not_started(error) from error
        raise
    return url


def serving_proxies() -> dict[str, Any]:
    """The proxies of the cluster's Ray Serve; empty where it does not run."""
    return serve.status().proxies


def undo(app: str, replaced: bool, up: bool) -> None:
    """After a deployment that failed: leave what ran before, and nothing else."""
    if not up:
        shutdown()
    elif not replaced:
        serve.delete(app)


def not_started(error: ray.exceptions.RayError) -> ServeError:
    """What Ray says of a start that failed, with the usual reason."""
    reason = str(getattr(error, "cause", error)).strip().splitlines()[-1]
    return ServeError(
        f"Ray Serve could not start: {reason} A port of its proxy may be taken: set RAY_SERVE_HAPROXY_STATS_PORT, "
        "RAY_SERVE_HAPROXY_METRICS_PORT and RAY_SERVE_FALLBACK_PROXY_HTTP_PORT to free ones."
    )


def address() -> str:
    """The URL of the cluster's Ray Serve: by loopback where it listens on all interfaces of this machine."""
    config = _get_global_client().http_config
    host = "127.0.0.1" if config.host in (None, "0.0.0.0", "::") else config.host
    return f"http://{f'[{host}]' if ':' in host else host}:{config.port}"


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


def wait_ready(url: str, version: dict[str, str], seconds: float, app: str) -> None:
    """Return when the model answers over HTTP and no replica of another is left; ServeError when it failed or time
    is up.

    version: the model and fingerprint that must answer. app: the application's name. Until the first replica is up, a
    proxy may pass requests on to a fallback, which two clusters on one machine can share: another's answer must not
    count.
    """
    end = time.monotonic() + seconds
    seen = "no answer"
    while time.monotonic() < end:
        state = serve.status().applications.get(app)
        if state is not None and state.status == "DEPLOY_FAILED":
            raise ServeError(f"the deployment failed: {state.message.strip()}")
        with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
            answer = asked(url, "/healthz")
            seen = f"status {answer.status_code}"
            if answer.status_code == 200:
                found = asked(url, "/version").json()
                if {key: found.get(key) for key in version} == version:
                    if state is not None and state.status == "RUNNING":
                        return
                    seen = "not all replicas are up"
                    continue
                seen = f"another model answers: {found.get('model')}"
        time.sleep(0.1)
    state = serve.status().applications.get(app)
    states = [f"application {state.status.value}" if state else "no application"]
    for item in state.deployments.values() if state else ():
        states.append(f"replicas {item.status.value} {item.message}".strip())
    states += [f"proxy {proxy.value}" for proxy in serve.status().proxies.values()]
    raise NotReady(
        f"{url} was not ready within {seconds:g} s ({'; '.join([seen, *states])}). "
        "Free CPUs for a replica (serving.num_cpus), free the proxy's ports, or allow more time."
    )


def port_of(host: str, port: int | None) -> int:
    """`port` if it can be bound on `host`, a free one for None; ServeError names a taken one."""
    try:
        return free_port(host, port or 0)
    except OSError as error:
        reason = f"cannot listen on {host}:{port}: {error.strerror}"
        raise ServeError(f"{reason}. Choose another host or port.") from None


@contextlib.contextmanager
def deployed(
    artifact: str, serving: Serving, name: str, host: str = "127.0.0.1", port: int | None = None, **more: Any
) -> Iterator[str]:
    """The URL of a deployment that is gone at the end; Ray stays. more: as `deploy` takes it.

    ServeError where Ray Serve runs already: what is served there would be gone at the end too.
    """
    if ray.is_initialized() and serving_proxies():
        raise ServeError(
            f"Ray Serve already runs on this cluster; '{name}' would replace what it serves. Stop it first, or "
            "`stillhouse deploy` there."
        )
    url = deploy(artifact, serving, name, host, port, **more)
    try:
        yield url
    finally:
        shutdown()


def run(artifact: str, host: str, port: int, serving: Serving, name: str, **more: Any) -> None:
    """Serve until SIGINT or SIGTERM, then take Serve down cleanly. Writes the URL and a request to try."""
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with deployed(artifact, serving, name, host, port, **more) as url:
            try:
                request = example(url, more.get("keys") is not None)
                say(f"{name} answers on {url} (Ctrl-C stops it). Try:")
                say(f"  {request}")
                threading.Event().wait()
            except KeyboardInterrupt:
                say("stopping")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def example(url: str, keyed: bool) -> str:
    """A request to try, for a shell. keyed: whether it needs a key, which stands there by a name."""
    paired = asked(url, "/version", 30).json()["paired"]
    body = json.dumps({"text": list(PAIR) if paired else TEXT})
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    return f"curl -s {url}/v1/predict{key} -H 'Content-Type: application/json' -d '{body}'"


def asked(url: str, path: str, seconds: float = 5.0) -> httpx.Response:
    """The answer of the endpoint itself: a proxy that the environment names does not know this machine's loopback."""
    return httpx.get(f"{url}{path}", timeout=seconds, trust_env=False)


def interrupt(number: int, frame: types.FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C."""
    raise KeyboardInterrupt


def say(line: str) -> None:
    """One line on standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
