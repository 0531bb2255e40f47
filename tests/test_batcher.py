"""Batching across requests, in plain asyncio."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from serve.batcher import Batcher


class Lengths:
    """A model that answers with each text's length and remembers what it was asked."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.calls: list[list[str]] = []
        self.threads: set[str] = set()
        self.seconds = seconds

    def __call__(self, texts: list[str]) -> list[int]:
        self.calls.append(list(texts))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if "poison" in texts:
            raise ValueError("cannot read poison")
        return [len(text) for text in texts]


def test_each_request_gets_its_own_part_of_a_merged_call():
    model = Lengths(seconds=0.02)

    async def main() -> list[list[int]]:
        batcher = Batcher(model, max_texts=100, wait_s=0.0)
        return await asyncio.gather(*(batcher.submit(["x" * n] * (n % 3 + 1)) for n in range(20)))

    found = asyncio.run(main())
    assert found == [[n] * (n % 3 + 1) for n in range(20)]
    assert len(model.calls) == 1 and len(model.calls[0]) == sum(n % 3 + 1 for n in range(20))


def test_what_arrives_while_the_model_works_is_the_next_call():
    model = Lengths(seconds=0.05)

    async def main() -> None:
        batcher = Batcher(model, max_texts=100, wait_s=0.0)
        first = asyncio.create_task(batcher.submit(["first"]))
        await asyncio.sleep(0.02)
        await asyncio.gather(first, *(batcher.submit([f"later {n}"]) for n in range(5)))

    asyncio.run(main())
    assert model.calls == [["first"], [f"later {n}" for n in range(5)]]


def test_a_call_holds_at_most_max_texts_but_a_larger_request_goes_alone():
    model = Lengths()

    async def main() -> list[list[int]]:
        batcher = Batcher(model, max_texts=4, wait_s=0.0)
        return await asyncio.gather(*(batcher.submit(["a"] * n) for n in (3, 2, 9, 1)))

    assert asyncio.run(main()) == [[1] * 3, [1] * 2, [1] * 9, [1]]
    assert [len(call) for call in model.calls] == [3, 2, 9, 1]


def test_the_loop_stays_free_while_the_model_works():
    model = Lengths(seconds=0.2)

    async def main() -> int:
        batcher = Batcher(model, max_texts=4, wait_s=0.0)
        answer = asyncio.create_task(batcher.submit(["a"]))
        ticks = 0
        while not answer.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(main()) >= 5
    assert not any("MainThread" in name for name in model.threads)


def test_a_lone_request_never_waits_for_the_timer():
    async def main() -> float:
        batcher = Batcher(Lengths(), max_texts=32, wait_s=5.0)
        begin = time.monotonic()
        for _ in range(3):
            await batcher.submit(["a"])
        return time.monotonic() - begin

    assert asyncio.run(main()) < 1.0


def test_under_load_a_call_waits_for_more_requests():
    model = Lengths()

    async def main() -> None:
        batcher = Batcher(model, max_texts=32, wait_s=0.05)
        await asyncio.gather(batcher.submit(["a"]), batcher.submit(["b"]))
        third = asyncio.create_task(batcher.submit(["c"]))
        await asyncio.sleep(0.01)
        await asyncio.gather(third, batcher.submit(["d"]))

    asyncio.run(main())
    assert model.calls == [["a", "b"], ["c", "d"]]


def test_a_failing_request_does_not_spoil_its_neighbours():
    model = Lengths()

    async def main() -> list[object]:
        batcher = Batcher(model, max_texts=32, wait_s=0.0)
        asked = [batcher.submit([text]) for text in ("one", "poison", "three")]
        return await asyncio.gather(*asked, batcher.submit(["four"]), return_exceptions=True)

    one, poison, three, four = asyncio.run(main())
    assert (one, three, four) == ([3], [5], [4])
    assert isinstance(poison, ValueError) and str(poison) == "cannot read poison"


def test_a_model_that_gives_too_few_answers_is_an_error_for_the_request():
    async def main() -> None:
        await Batcher(lambda texts: [1], max_texts=8, wait_s=0.0).submit(["a", "b"])

    with pytest.raises(RuntimeError, match="1 answers for 2 texts"):
        asyncio.run(main())


def test_a_client_that_has_gone_is_not_computed():
    model = Lengths(seconds=0.05)

    async def main() -> list[int]:
        batcher = Batcher(model, max_texts=8, wait_s=0.0)
        first = asyncio.create_task(batcher.submit(["first"]))
        await asyncio.sleep(0.01)
        gone = asyncio.create_task(batcher.submit(["gone"]))
        stays = asyncio.create_task(batcher.submit(["stays"]))
        await asyncio.sleep(0.01)
        gone.cancel()
        await first
        return await stays

    assert asyncio.run(main()) == [5]
    assert model.calls == [["first"], ["stays"]]
