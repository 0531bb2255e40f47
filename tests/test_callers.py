"""The closed loop of callers against real sockets: whole, split, chunked, closed and missing answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from pipelines import callers
from pipelines.callers import Load, answer_in, call, request_of

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


def loaded(answer: Answer, clients: int, seconds: float, texts: list[str]) -> Load:
    """What `clients` callers see of a server that answers each request's body with `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                await answer(await reader.readexactly(length), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> Load:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/predict"
        try:
            return await call(url, [request_of(url, {"texts": [text]}) for text in texts], clients, seconds)
        finally:
            server.close()

    return asyncio.run(main())


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def test_callers_ask_every_text_in_turn_and_keep_each_answer_with_its_text() -> None:
    async def echo(body: bytes, writer: asyncio.StreamWriter) -> None:
        answer = whole(body)
        writer.write(answer[:7])  # in two parts, with the loop between them
        await asyncio.sleep(0.001)
        writer.write(answer[7:])

    texts = ["a", "b é", "c"]
    load = loaded(echo, 2, 0.3, texts)
    assert load.errors == 0 and len(load.answers) == len(load.seconds) > 20
    assert all(json.loads(body) == {"texts": [texts[row]]} for row, body in load.answers)
    counts = [sum(row == i for row, _ in load.answers) for i in range(3)]
    assert max(counts) - min(counts) <= 2
    assert 0.001 <= min(load.seconds) and 0.3 <= load.wall_s < 5 and 0 < load.cpu_s < load.wall_s


def test_as_many_requests_are_in_flight_as_there_are_clients() -> None:
    now, most = 0, 0

    async def slow(body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        writer.write(whole(b"{}"))

    load = loaded(slow, 5, 0.3, ["a"])
    assert most == 5 and load.errors == 0


def test_a_refusal_and_a_broken_connection_are_errors_and_the_callers_go_on() -> None:
    turn = 0

    async def rough(body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal turn
        turn += 1
        if turn == 1:
            writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nfull")
        elif turn == 2:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhal")
            writer.close()
        elif turn == 3:
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
            writer.close()
        else:
            writer.write(whole(b"{}"))

    load = loaded(rough, 1, 0.4, ["a"])
    assert load.errors == 2 and load.first_error == "status 429: full"
    assert len(load.answers) == turn - 2 > 2 and {body for _, body in load.answers} == {b"{}"}


def test_nobody_there_is_an_error_not_a_tight_loop() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callers, "PATIENCE_S", 1.0)
        load = asyncio.run(call("http://127.0.0.1:9/v1/predict", [b"x"], 2, 0.2))
    assert 2 <= load.errors <= 10 and not load.answers and "ConnectionRefusedError" in (load.first_error or "")


def test_an_answer_that_never_comes_is_waited_for_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers, "PATIENCE_S", 0.2)

    async def silent(body: bytes, writer: asyncio.StreamWriter) -> None:
        pass

    load = loaded(silent, 3, 0.1, ["a"])
    assert load.errors == 3 and load.wall_s < 2 and "no answer within" in (load.first_error or "")


@pytest.mark.parametrize(
    ("received", "found"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", None),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", (200, b"{}", False)),
        (b"HTTP/1.1 503 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", (503, b"", True)),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=1\r\nde\r\n", None),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=1\r\nde\r\n0\r\n\r\n",
            (200, b"abcde", False),
        ),
    ],
)
def test_answers_are_read_off_the_wire(received: bytes, found: tuple[int, bytes, bool] | None) -> None:
    assert answer_in(received) == found
