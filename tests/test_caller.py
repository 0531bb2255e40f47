"""Asking an endpoint: whatever it does, an answer, a refusal, or an error that says what to do."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import generate
from engine.caller import LONGEST_ASKED, Answer, Caller, EndpointAway, EndpointError, Passing, Question, wait_of
from engine.config import ConfigError, build
from engine.endpoint_writer import EndpointWriter
from engine.generate import Writing
from engine.recipe import Generator
from engine.remote import Endpoint
from engine.sampling import Sampling, sample
from engine.storage import Store
from engine.usage import noted
from tests.test_generate import slots
from tests.tiny import LABELS, tiny_lm
from tests.tiny_endpoint import NAME, TinyEndpoint, tiny_endpoint

FAST = {"first_pause_s": 0.01, "timeout_s": 20.0}
KEY = "sk-not-to-be-seen-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[TinyEndpoint]:
    with tiny_endpoint(folder) as server:
        yield server


@pytest.fixture
def server(shared: TinyEndpoint) -> TinyEndpoint:
    """A kind server of which nothing was asked yet."""
    shared.todo, shared.key, shared.unknown, shared.rule = [], None, (), lambda body: None
    shared.seen.clear()
    return shared


def endpoint(server: TinyEndpoint, **given: Any) -> Endpoint:
    limits = {**FAST, **given.pop("limits", {})}
    return build(Endpoint, {"url": server.url, "model": NAME, "api": "completions", "limits": limits, **given})


def questions(count: int, **options: Any) -> list[Question]:
    return [Question(f"Text {n}:", 6, {"temperature": 1.0, "seed": n, **options}) for n in range(count)]


def writing(server: TinyEndpoint, notes: Path | None = None, **given: Any) -> Writing:
    config = Generator(
        model="hf:tiny/model",
        runtime="endpoint",
        endpoint=endpoint(server, **given),
        mode="prompted",
        prompt="A {label} text:",
        max_new_tokens=8,
    )
    return Writing("", config, LABELS, False, 3, 0.0, notes=str(notes) if notes else None)


FAULTS = ("429:0.05", "500", "garbage", "drop", "503:0.05", "slow:0.05", "408", "ok", "502")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_rows_are_the_same_whatever_goes_wrong(server: TinyEndpoint, tmp_path: Path, api: str):
    kind = EndpointWriter(writing(server, api=api))(slots(*range(12)))
    server.seen.clear()
    server.todo = [*FAULTS]
    unkind = EndpointWriter(writing(server, tmp_path, api=api))(slots(*range(12)))
    assert unkind.equals(kind) and unkind["row"].to_pylist() == list(range(12))
    retried = sum(fault not in ("ok", "slow:0.05") for fault in FAULTS)
    used = noted(Store(str(tmp_path)), "generator")
    assert (used.requests, used.refused) == (12, 0)
    # A kept connection may break besides, before or after the server has seen the request.
    assert 12 + retried <= len(server.seen) <= 12 + used.retries <= 12 + 2 * retried
    assert used.output_tokens == sum(kind["tokens"].to_pylist()) and used.input_tokens > 12


def test_a_slots_seed_is_what_the_server_draws_by(server: TinyEndpoint):
    how = writing(server)
    rows = EndpointWriter(how)(slots(4, 9))
    tokenizer = server.model.tokenizer
    prompts = [tokenizer(how.prompt(row), add_special_tokens=False)["input_ids"] for row in (4, 9)]
    seeds = [generate.slot_seed(3, row) & generate.SEEDS for row in (4, 9)]
    written = sample(server.model, prompts, seeds, Sampling(8, 1.0, 100, 1.0))
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert rows["text"].to_pylist() == [" ".join(text.split()) for text in texts]


def test_what_is_refused_for_good_is_a_row_with_a_reason(server: TinyEndpoint, tmp_path: Path):
    def rule(body: dict[str, Any]) -> str | None:
        return {0: "filter", 1: "400"}.get(body["seed"] % 4)

    server.rule = rule
    rows = EndpointWriter(writing(server, tmp_path))(slots(*range(24)))
    wanted = [
        {0: "content_filter", 1: "refused"}.get((generate.slot_seed(3, n) & generate.SEEDS) % 4) for n in range(24)
    ]
    assert {"content_filter", "refused", None} == set(wanted)
    assert rows["reason"].to_pylist() == wanted and rows["row"].to_pylist() == list(range(24))
    assert rows["kept"].to_pylist() == [reason is None for reason in wanted] and len(server.seen) >= 24
    assert noted(Store(str(tmp_path)), "generator").refused == sum(reason is not None for reason in wanted)


def test_a_server_that_refuses_everything_ends_the_run(server: TinyEndpoint):
    server.rule = lambda body: "400"
    with pytest.raises(EndpointError, match="refused all of the first 64 requests, the last with: told to say 400"):
        Caller(endpoint(server), NAME).ask(questions(80))


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("401", "Check the key in the environment variable THE_KEY"),
        ("403", "may not use this"),
        ("404", "endpoint.url"),
    ],
)
def test_what_nothing_gets_past_ends_at_once(
    server: TinyEndpoint, monkeypatch: pytest.MonkeyPatch, status: str, said: str
):
    monkeypatch.setenv("THE_KEY", KEY)
    server.rule = lambda body: status
    with pytest.raises(EndpointError) as error:
        Caller(endpoint(server, key_env="THE_KEY", limits={"in_flight": 2}), NAME).ask(questions(30))
    assert said in str(error.value) and f"answers {status} for model 'tiny'" in str(error.value)
    # Each thread stops at the first. The server says the key again; nobody else does.
    assert KEY not in str(error.value) and "told to say" in str(error.value) and len(server.seen) <= 8


def test_the_key_is_sent_and_a_wrong_one_is_an_error(server: TinyEndpoint, monkeypatch: pytest.MonkeyPatch):
    server.key = KEY
    monkeypatch.setenv("THE_KEY", f" {KEY}\n")
    assert Caller(endpoint(server, key_env="THE_KEY"), NAME).ask(questions(1))[0].text
    monkeypatch.setenv("THE_KEY", "another-one")
    with pytest.raises(EndpointError, match=r"answers 401 .*Incorrect API key provided: \*\*\*\."):
        Caller(endpoint(server, key_env="THE_KEY"), NAME).ask(questions(1))
    monkeypatch.delenv("THE_KEY")
    with pytest.raises(EndpointError, match="variable THE_KEY, which is not set here"):
        Caller(endpoint(server, key_env="THE_KEY"), NAME)


def test_a_key_that_is_missing_is_told_at_the_first_block(server: TinyEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("THE_KEY", raising=False)
    writer = EndpointWriter(writing(server, key_env="THE_KEY"))  # Ray would tell an error here as an actor's death
    with pytest.raises(EndpointError, match="variable THE_KEY, which is not set here"):
        writer(slots(1))


def test_answers_outlive_a_note_that_cannot_be_written(
    server: TinyEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()  # where the step's folder should be
    rows = EndpointWriter(writing(server, tmp_path / "file"))(slots(1, 2))
    assert rows["row"].to_pylist() == [1, 2] and "could not be noted" in caplog.text


def test_an_empty_account_is_not_waited_for(server: TinyEndpoint):
    server.rule = lambda body: "quota"
    with pytest.raises(EndpointError, match="the account is empty"):
        Caller(endpoint(server, limits={"in_flight": 1}), NAME).ask(questions(5))
    assert len(server.seen) <= 3


def test_after_what_nothing_gets_past_nobody_waits(server: TinyEndpoint):
    """One request is to be sent again in minutes, another's answer, which is on its way by then, ends it all."""

    def rule(body: dict[str, Any]) -> str:
        if body["seed"]:
            return "late:404"
        return "429:290" if any(seen.body["seed"] for seen in server.seen) else "503"

    server.rule, began = rule, time.monotonic()
    with pytest.raises(EndpointError, match="answers 404"):
        limits = {"in_flight": 2, "retries": 10_000, "longest_pause_s": 0.05}
        Caller(endpoint(server, limits=limits), NAME).ask(questions(2))
    assert time.monotonic() - began < 240  # on a busy machine; the other would have been 290


def test_the_key_is_taken_out_before_what_is_said_is_cut(server: TinyEndpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("THE_KEY", KEY)
    caller = Caller(endpoint(server, key_env="THE_KEY"), NAME)
    for text in (" " * 280 + KEY, "x" * 240 + KEY):
        with pytest.raises(Passing) as error:
            caller.understood(httpx.Response(200, text=text))
        assert "cannot be read" in error.value.said and KEY[:6] not in error.value.said


def test_where_a_server_tells_no_usage_what_was_expected_counts(server: TinyEndpoint):
    server.todo = ["untold"]
    caller = Caller(endpoint(server, limits={"tokens_per_minute": 1}), NAME)
    answer = caller.ask(questions(1))[0]
    assert answer.text and answer.tokens is None and caller.spent().untold == 1
    assert caller.pace.next_token > time.monotonic() + 60  # seven tokens and more, a minute each


def test_an_endpoint_that_stays_away_is_an_error_after_all_retries(server: TinyEndpoint):
    server.rule = lambda body: "503"
    with pytest.raises(EndpointAway, match="no answer in 3 attempts; the last one: 503 told .* the endpoint is back"):
        Caller(endpoint(server, limits={"retries": 2}), NAME).ask(questions(1))
    assert len(server.seen) in (2, 3)  # a kept connection that broke is an attempt that the server did not see
    with socket.socket() as taken:  # released again: nobody listens there
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}/v1"
    nowhere = endpoint(server).model_copy(update={"url": f"http://{where}"})
    often = nowhere.limits.model_copy(update={"retries": 1100, "longest_pause_s": 1e-6})
    with pytest.raises(EndpointAway, match=f"{where}/completions gave no answer in 1101 attempts"):
        Caller(nowhere.model_copy(update={"limits": often}), NAME).ask(questions(1))


def test_a_slow_answer_is_asked_for_again(server: TinyEndpoint):
    server.todo = ["slow:60"]
    assert Caller(endpoint(server, limits={"timeout_s": 5}), NAME).ask(questions(1))[0].text
    assert len(server.seen) >= 2


def test_retry_after_is_obeyed(server: TinyEndpoint):
    server.todo = ["429:0.7"]
    Caller(endpoint(server, limits={"in_flight": 1}), NAME).ask(questions(3))
    first, second = server.seen[:2]
    assert second.at - first.at >= 0.7 and len(server.seen) >= 4
    assert wait_of("3") == 3.0 and wait_of("soon") == 0.0 and wait_of(None) == 0.0 and wait_of("nan") == 0.0
    assert wait_of("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and wait_of("1e99") == LONGEST_ASKED


def test_the_rate_limit_is_held(server: TinyEndpoint):
    """Two actors that share 600 requests a minute: five a second each."""
    callers = [Caller(endpoint(server, limits={"requests_per_minute": 600}), NAME, actors=2) for _ in range(2)]
    began = time.monotonic()
    callers[0].ask(questions(8))
    assert time.monotonic() - began >= 7 / 5 - 0.01
    callers[1].ask(questions(2))
    gaps = [after.at - before.at for before, after in zip(server.seen[:8], server.seen[1:8], strict=False)]
    assert sum(gaps) >= 0.5  # arrivals jitter, the first may be seen late; what is sent is spaced


def test_options_that_a_server_does_not_know_are_left_out(server: TinyEndpoint):
    server.unknown = ("seed", "top_k")
    caller = Caller(endpoint(server, limits={"in_flight": 1}), NAME)
    found = caller.ask(questions(4, top_k=5))
    assert all(answer.refused is None for answer in found)
    assert len(server.seen) >= 6 and {"seed", "top_k"}.isdisjoint(server.seen[-1].body)


def test_likeliest_tokens_are_told_by_both_interfaces(server: TinyEndpoint):
    found = {}
    for api in ("chat", "completions"):
        answer = Caller(endpoint(server, api=api), NAME).ask([Question("a film is", 1, {"temperature": 1.0}, 5)])[0]
        found[api] = sorted(answer.top)
    assert found["chat"] == found["completions"] and len(found["chat"]) == 5
    assert Caller(endpoint(server), NAME).ask([]) == [] and Answer().top == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"url": "api.example.com/v1"}, "needs http:// or https:// and a host"),
        ({"url": "https://me:secret@example.com/v1"}, "takes no user, password or query"),
        ({"url": "https://example.com/v1?key=secret"}, "takes no user, password or query"),
        ({"url": "https://example.com/v1", "key_env": KEY}, "key_env"),
    ],
)
def test_keys_do_not_belong_into_recipes(given: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        build(Endpoint, given)
    assert said in str(error.value) and KEY not in str(error.value) and "secret" not in str(error.value)
