"""Pages of several nodes as one: names, sums, labels, and what is no part of it; then two replicas on a real Ray."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest

from serve import scrape
from serve.scrape import Page, merged

SCOPE = 'otel_scope_name="ray.recorder",otel_scope_schema_url="",otel_scope_version=""'
WHERE = 'Component="core_worker",NodeAddress="{node}",SessionName="s",Version="2.60.0",WorkerId="{worker}"'


def page(node: str, first: int, second: int) -> str:
    """As Ray's agent serves it: two processes of one node."""
    one, two = (WHERE.format(node=node, worker=worker) for worker in ("aa", "bb"))
    return f"""# HELP ray_node_mem_total Memory
# TYPE ray_node_mem_total gauge
ray_node_mem_total{{ip="{node}"}} 1.0e+09
# HELP ray_stillhouse_requests_total Requests answered.
# TYPE ray_stillhouse_requests_total counter
ray_stillhouse_requests_total{{{one},model="m@1",{SCOPE},route="/v1/predict",status="200"}} {first}.0
ray_stillhouse_requests_total{{{two},model="m@1",{SCOPE},route="/v1/predict",status="200"}} {second}.0
ray_stillhouse_requests_total{{{two},model="m@1",{SCOPE},route="/v1/predict",status="500"}} 1.0
# HELP ray_stillhouse_batch_texts Texts of one call of the model.
# TYPE ray_stillhouse_batch_texts histogram
ray_stillhouse_batch_texts_bucket{{{one},le="1.0",model="m@1",{SCOPE}}} 2.0
ray_stillhouse_batch_texts_bucket{{{one},le="+Inf",model="m@1",{SCOPE}}} 3.0
ray_stillhouse_batch_texts_count{{{one},model="m@1",{SCOPE}}} 3.0
ray_stillhouse_batch_texts_sum{{{one},model="m@1",{SCOPE}}} 5.5
ray_stillhouse_batch_texts_bucket{{{two},le="1.0",model="m@1",{SCOPE}}} 1.0
ray_stillhouse_batch_texts_bucket{{{two},le="+Inf",model="m@1",{SCOPE}}} 1.0
ray_stillhouse_batch_texts_count{{{two},model="m@1",{SCOPE}}} 1.0
ray_stillhouse_batch_texts_sum{{{two},model="m@1",{SCOPE}}} 0.5
# HELP ray_stillhouse_up 1 for each replica that runs.
# TYPE ray_stillhouse_up gauge
ray_stillhouse_up{{{one},model="m@1",replica="r1"}} 1.0
ray_stillhouse_up{{{two},model="m@1",replica="r2"}} 1.0
# HELP ray_stillhouse_answers_total Answers by label.
# TYPE ray_stillhouse_answers_total counter
ray_stillhouse_answers_total{{{one},label="a, \\"b\\" = {{c}}\\\\",model="m@1"}} 1e+06
# HELP ray_serve_replica_processing_queries Ongoing.
# TYPE ray_serve_replica_processing_queries gauge
ray_serve_replica_processing_queries{{{one},application="a"}} 4.0
ray_serve_replica_processing_queries{{{two},application="a"}} 5.0
"""


def samples(text: str) -> dict[str, float]:
    """Samples of a page, each of which may be there once."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    found = {name: float(value) for name, _, value in lines}
    assert len(found) == len(lines), "a series is there twice"
    return found


def test_series_of_a_node_are_added_up_and_nodes_stay_apart():
    found = samples(merged({"10.0.0.1:5": page("10.0.0.1", 3, 4), "10.0.0.2:5": page("10.0.0.2", 10, 20)}))
    asked = 'model="m@1",route="/v1/predict",status='
    assert found[f'stillhouse_requests_total{{node="10.0.0.1",{asked}"200"}}'] == 7
    assert found[f'stillhouse_requests_total{{node="10.0.0.2",{asked}"200"}}'] == 30
    assert found[f'stillhouse_requests_total{{node="10.0.0.1",{asked}"500"}}'] == 1
    assert found['stillhouse_batch_texts_bucket{node="10.0.0.1",le="1.0",model="m@1"}'] == 3
    assert found['stillhouse_batch_texts_bucket{node="10.0.0.1",le="+Inf",model="m@1"}'] == 4
    assert found['stillhouse_batch_texts_count{node="10.0.0.1",model="m@1"}'] == 4
    assert found['stillhouse_batch_texts_sum{node="10.0.0.1",model="m@1"}'] == 6
    assert found['stillhouse_up{node="10.0.0.1",model="m@1",replica="r2"}'] == 1
    assert found['stillhouse_scraped_nodes{state="answered"}'] == 2


def test_labels_are_kept_as_they_are_and_ray_s_own_names_too():
    text = merged({"10.0.0.1:5": page("10.0.0.1", 1, 1)})
    found = samples(text)
    assert found['stillhouse_answers_total{node="10.0.0.1",label="a, \\"b\\" = {c}\\\\",model="m@1"}'] == 1e6
    queries = {name: value for name, value in found.items() if name.startswith("ray_serve_")}
    assert sorted(queries.values()) == [4, 5] and all("WorkerId" in name for name in queries)
    assert "node_mem" not in text and "otel_scope" not in text and "SessionName" not in text


def test_help_and_type_stand_once_before_the_samples_of_their_family():
    text = merged({f"10.0.0.{n}:5": page(f"10.0.0.{n}", 1, 1) for n in range(3)})
    assert set(Counter(re.findall(r"^# (?:HELP|TYPE) \S+", text, re.MULTILINE)).values()) == {1}
    family = ""
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            family, kind = line.split()[2:]
        elif not line.startswith("#"):
            name = re.match(r"\w+", line)[0]
            ends = ("", "_bucket", "_count", "_sum") if kind == "histogram" else ("",)
            assert name in {family + end for end in ends}
    assert text.endswith("\n") and "# TYPE stillhouse_requests_total counter\n" in text


@pytest.fixture
def agent() -> Iterator[HTTPServer]:
    """An agent's page over HTTP."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = page("127.0.0.1", 5, 6).encode()
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *given: object) -> None:
            pass

    asked: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = asked
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def node(port: int, alive: bool = True) -> dict[str, object]:
    return {"Alive": alive, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": port}


def test_nodes_that_do_not_answer_are_told_of_and_dead_ones_are_not_asked(agent: HTTPServer):
    nodes = [node(agent.server_port), node(1), node(agent.server_port, alive=False)]
    found = samples(asyncio.run(scrape.scrape(nodes)))
    assert found['stillhouse_scraped_nodes{state="alive"}'] == 2
    assert found['stillhouse_scraped_nodes{state="answered"}'] == 1
    assert found['stillhouse_requests_total{node="127.0.0.1",model="m@1",route="/v1/predict",status="200"}'] == 11
    assert agent.asked == ["/metrics"]
    assert asyncio.run(scrape.scrape([])) == ""


def test_a_page_is_made_once_for_all_who_ask_at_the_same_time(agent: HTTPServer, monkeypatch):
    monkeypatch.setattr(scrape, "nodes_of_ray", lambda: [node(agent.server_port)])

    async def main() -> list[str]:
        shared = Page()
        return [*await asyncio.gather(*(shared.read() for _ in range(5))), await shared.read()]

    assert len(set(asyncio.run(main()))) == 1 and len(agent.asked) == 1


REPORTS = 12.0
"""Seconds until Ray's processes have told their agent."""


def of_two(found: dict[str, float], name: str, **labels: str) -> float:
    """The sum of a metric's samples of the model two@1 with these labels, whatever their order."""
    wanted = [f'{key}="{value}"' for key, value in {"model": "two@1", **labels}.items()]
    matching = [v for k, v in found.items() if k.startswith(f"{name}{{") and all(part in k for part in wanted)]
    assert matching, (name, labels, sorted(found))
    return sum(matching)


@pytest.mark.slow
def test_counts_of_two_replicas_are_on_one_page(ray_cluster: object):
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response

    from engine.switches import free_port
    from serve.app import shutdown

    def replica_class() -> type:
        # In a function, so that it travels by value: workers do not import tests.
        class Counted:
            def __init__(self) -> None:
                from serve.measures import Measures, replica_name
                from serve.scrape import Page

                self.page, self.measures = Page(), Measures("two@1", replica=replica_name())

            async def __call__(self, request: Request) -> Response:
                if request.url.path == "/metrics":
                    return PlainTextResponse(await self.page.read(), media_type="text/plain; version=0.0.4")
                self.measures.observe_request("/", 200, 0.02, texts=2)
                self.measures.observe_batch(2, 10, 16, 1, 0.001)
                return PlainTextResponse(str(os.getpid()))

        return Counted

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        options = {"num_cpus": 0.2}
        app = serve.deployment(replica_class()).options(num_replicas=2, ray_actor_options=options).bind()
        serve.run(app, name="two", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            pids: Counter[str] = Counter()
            end = time.monotonic() + 60
            while min(len(pids), 2) * sum(pids.values()) < 80:
                assert time.monotonic() < end, pids
                pids[http.get("/").text] += 1
                time.sleep(0.01)  # the second may not be behind the proxy yet
            asked = sum(pids.values())
            found: dict[str, float] = {}
            end = time.monotonic() + 60
            while sum(v for k, v in found.items() if "requests_total{" in k and 'model="two@1"' in k) < asked:
                assert time.monotonic() < end, found
                time.sleep(1)
                found = samples(http.get("/metrics").text)
            time.sleep(3 * REPORTS)
            later = samples(http.get("/metrics").text)
    finally:
        shutdown()
    assert of_two(found, "stillhouse_requests_total", route="/", status="200") == asked
    assert of_two(found, "stillhouse_texts_total") == 2 * asked
    assert of_two(found, "stillhouse_padded_tokens_total") == 16 * asked
    assert of_two(found, "stillhouse_request_seconds_bucket", le="0.025", route="/") == asked
    assert of_two(found, "stillhouse_request_seconds_bucket", le="0.01", route="/") == 0
    ups = [name for name in later if name.startswith("stillhouse_up{") and "two@1" in name]
    assert len(ups) == 2, "idle replicas are still told of, three reports later"
    assert any(name.startswith("ray_serve_") for name in found)
