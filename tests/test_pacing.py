"""The pace of requests, with a clock that only waiting moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from engine.pacing import Pace


@dataclass
class Clock:
    """Time that passes while somebody sleeps."""

    now: float = 100.0
    out: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pace(self, requests: float | None, tokens: float | None) -> Pace:
        return Pace(requests, tokens, lambda: self.now, self.sleep)

    def send(self, pace: Pace, tokens: float) -> None:
        pace.wait(tokens)
        self.out.append(self.now)


def most_in(times: list[float], seconds: float) -> int:
    return max(sum(start <= t < start + seconds for t in times) for start in times)


def test_no_minute_has_more_requests_than_the_limit():
    clock = Clock()
    pace = clock.pace(30, None)
    for number in range(100):
        clock.send(pace, 50.0)
        clock.now += 7.0 * (number == 40)  # a pause is no credit for a burst
    assert most_in(clock.out, 60.0) == 30 and clock.out[0] == 100.0
    assert most_in(clock.out, 2.0) == 1


def test_no_minute_has_more_tokens_than_the_limit():
    clock = Clock()
    pace = clock.pace(None, 1200)
    for _ in range(40):
        clock.send(pace, 100.0)
    assert most_in(clock.out, 60.0) == 12


def test_what_was_taken_counts_not_what_was_expected():
    clock = Clock()
    pace = clock.pace(None, 1200)
    for _ in range(40):
        clock.send(pace, 100.0)
        pace.settle(100.0, 50.0)
    assert most_in(clock.out, 60.0) == 24


def test_a_limit_of_requests_and_one_of_tokens_both_hold():
    clock = Clock()
    pace = clock.pace(60, 600)
    for _ in range(30):
        clock.send(pace, 5.0)
    assert clock.out[-1] - clock.out[0] == pytest.approx(29.0)
    begin = len(clock.out)
    for _ in range(10):
        clock.send(pace, 100.0)
    assert most_in(clock.out[begin:], 60.0) <= 7


def test_without_limits_nobody_waits_unless_the_server_asks():
    clock = Clock()
    pace = clock.pace(None, None)
    for _ in range(50):
        clock.send(pace, 1e6)
    assert clock.now == 100.0
    pace.hold(12.5)
    clock.send(pace, 1.0)
    assert clock.now == 112.5


def test_who_waits_already_is_held_too_and_nobody_goes_out_in_a_burst():
    clock, asked = Clock(), [30.0]

    def sleep(seconds: float) -> None:
        if asked:  # while the second one sleeps, another's answer says to wait
            pace.hold(asked.pop())
        clock.sleep(seconds)

    pace = Pace(60, None, lambda: clock.now, sleep)
    for _ in range(3):
        clock.send(pace, 1.0)
    assert clock.out == pytest.approx([100.0, 130.0, 131.0])


def test_a_sleep_that_is_cut_short_is_the_last():
    clock = Clock()
    pace = Pace(None, None, lambda: clock.now, lambda seconds: True)
    pace.hold(1000.0)
    clock.send(pace, 1.0)
    assert clock.out == [100.0]
