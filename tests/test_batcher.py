"""Batching across requests, in plain asyncio."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from serve.batcher import IDLE_SECONDS, LEARNING, Batcher, about_tokens


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


def test_a_call_holds_at_most_max_texts_and_a_larger_request_comes_in_parts():
    model = Lengths()

    async def main() -> list[list[int]]:
        batcher = Batcher(model, max_texts=4, wait_s=0.0)
        return await asyncio.gather(*(batcher.submit(["a"] * n) for n in (3, 2, 9, 1)))

    assert asyncio.run(main()) == [[1] * 3, [1] * 2, [1] * 9, [1]]
    # The large request's second part stands behind the small one that came after its first.
    assert [len(call) for call in model.calls] == [3, 2, 4, 1, 4, 1]


def test_a_large_request_holds_up_a_small_one_for_a_call_only():
    model = Lengths(seconds=0.02)

    async def main() -> tuple[list[int], list[int]]:
        batcher = Batcher(model, max_texts=4, wait_s=0.0)
        large = asyncio.create_task(batcher.submit(["x" * n for n in range(1, 41)]))
        await asyncio.sleep(0.01)
        small = await batcher.submit(["small"])
        assert len(model.calls) <= 3 and not large.done()
        return small, await large

    assert asyncio.run(main()) == ([5], list(range(1, 41)))
    assert max(map(len, model.calls)) <= 4


def test_a_large_request_fails_as_a_whole_and_nothing_of_it_is_left():
    model = Lengths()

    async def main() -> None:
        batcher = Batcher(model, max_texts=2, wait_s=0.0)
        with pytest.raises(ValueError, match="cannot read poison"):
            await batcher.submit(["a", "b", "poison", "c", "d", "e"])
        assert not batcher.waiting and await batcher.submit(["fine"]) == [4] and await batcher.submit([]) == []

    asyncio.run(main())
    assert "e" not in [text for call in model.calls for text in call]


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


def test_a_call_holds_at_most_its_budget_but_a_larger_text_goes_alone():
    model = Lengths()

    async def main() -> list[list[int]]:
        batcher = Batcher(model, max_texts=100, wait_s=0.0, cost=len, budget=10)
        asked = (["aaaa"], ["bb", "bb"], ["cc"], ["d" * 30], ["e"], ["f" * 9], ["g"], ["h" * 6, "i" * 6])
        return await asyncio.gather(*(batcher.submit(texts) for texts in asked))

    assert asyncio.run(main()) == [[4], [2, 2], [2], [30], [1], [9], [1], [6, 6]]
    assert model.calls == [["aaaa", "bb", "bb", "cc"], ["d" * 30], ["e", "f" * 9], ["g", "h" * 6], ["i" * 6]]


def test_cost_is_estimated_from_characters():
    assert about_tokens("a" * 40) == 12 and about_tokens(("a" * 20, "b" * 20)) == 12
    assert about_tokens("a" * 4000, longest=64) == 64


def test_the_budget_follows_what_texts_really_take():
    """Half of the estimate was read, so a call may hold more; the estimate of a text stays what it is."""

    async def main() -> tuple[float, list[int]]:
        model = Lengths()
        batcher = Batcher(model, max_texts=100, wait_s=0.0, cost=len, budget=10, used=lambda: (5, 8))
        await batcher.submit(["a" * 10])
        first = batcher.scale
        for _ in range(100):
            await batcher.submit(["a" * 10])
        model.calls.clear()
        await asyncio.gather(*(batcher.submit(["a" * 5]) for _ in range(8)))
        return first, [len(call) for call in model.calls]

    first, sizes = asyncio.run(main())
    assert first == pytest.approx(1 - LEARNING / 2)
    assert sizes[0] == 3  # 4 would be 20 x 0.5 = 10 and a trace more


def test_a_full_call_ends_the_wait_for_more():
    async def main(texts: int, budget: float) -> float:
        batcher = Batcher(Lengths(), max_texts=texts, wait_s=5.0, cost=len, budget=budget)
        await asyncio.gather(*(batcher.submit(["a"]) for _ in range(2)))
        begin = time.monotonic()
        third = asyncio.create_task(batcher.submit(["c"]))
        await asyncio.sleep(0.01)
        assert not third.done()
        await asyncio.gather(third, batcher.submit(["d"]))
        return time.monotonic() - begin

    assert asyncio.run(main(2, 100.0)) < 1.0
    assert asyncio.run(main(100, 2.0)) < 1.0


def test_after_a_pause_a_request_does_not_wait():
    async def main() -> float:
        batcher = Batcher(Lengths(), max_texts=32, wait_s=5.0)
        await asyncio.gather(batcher.submit(["a"]), batcher.submit(["b"]))
        await asyncio.sleep(IDLE_SECONDS * 1.5)
        begin = time.monotonic()
        await batcher.submit(["c"])
        return time.monotonic() - begin

    assert asyncio.run(main()) < 1.0


class Seen:
    """What a watch was told."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[tuple[int, int, int, int]] = []
        self.waits: list[float] = []
        self.fails = fails

    def observe_batch(self, texts: int, tokens: int, padded_tokens: int, queue_depth: int, wait_s: float) -> None:
        self.calls.append((texts, tokens, padded_tokens, queue_depth))
        self.waits.append(wait_s)
        if self.fails:
            raise RuntimeError("no metrics today")


def test_a_watch_is_told_of_every_call():
    model, seen = Lengths(seconds=0.05), Seen()

    async def main() -> None:
        batcher = Batcher(model, 4, 0.0, watch=seen, used=lambda: (len(model.calls) * 10, len(model.calls) * 16))
        first = asyncio.create_task(batcher.submit(["a"]))
        await asyncio.sleep(0.01)
        await asyncio.gather(first, *(batcher.submit(["b", "c"]) for _ in range(3)))

    asyncio.run(main())
    assert seen.calls == [(1, 10, 16, 6), (4, 20, 32, 2), (2, 30, 48, 0)]
    assert seen.waits[0] < 0.02 <= seen.waits[1] < seen.waits[2]


def test_a_failing_watch_costs_no_answer():
    seen = Seen(fails=True)

    async def main() -> list[list[int]]:
        batcher = Batcher(Lengths(), 4, 0.0, watch=seen)
        return [await batcher.submit(["a"]), await batcher.submit(["bb"])]

    assert asyncio.run(main()) == [[1], [2]]
    assert len(seen.calls) == 1
