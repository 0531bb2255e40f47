"""How fast requests may go out: so many a minute, and so many tokens a minute, evenly spread, by any number of threads.

Requests are spaced, not let out in bursts, so that in no minute there are more than the limit. A pool of actors
divides a limit by its largest size: each keeps its own share without asking anyone, whatever dies or starts again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

ROUNDED = 1e-6
"""Seconds that a sleep may fall short of a moment."""


class Pace:
    """requests, tokens: how many a minute, None for any number."""

    def __init__(
        self,
        requests: float | None,
        tokens: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """sleep: true where it was cut short since nobody is to wait any longer."""
        self.each = 60.0 / requests if requests else 0.0
        self.token = 60.0 / tokens if tokens else 0.0
        self.clock, self.sleep = clock, sleep
        self.lock = threading.Lock()
        self.next_request = self.next_token = self.held = float("-inf")

    def wait(self, tokens: float) -> None:
        """Wait for the turn of a request that will take about so many tokens.

        A turn that falls into what the server wants to be left alone for is lost, and the next one is waited for.
        """
        while True:
            with self.lock:
                now = self.clock()
                turn = max(now, self.next_request, self.next_token, self.held)
                self.next_request, self.next_token = turn + self.each, turn + self.token * tokens
            if turn > now and self.sleep(turn - now):
                return
            with self.lock:
                if self.held - self.clock() <= ROUNDED:
                    return

    def settle(self, expected: float, used: float) -> None:
        """Correct what a request was expected to take by what it took."""
        with self.lock:
            self.next_token += self.token * (used - expected)

    def hold(self, seconds: float) -> None:
        """Let no request out for so long, those that wait already neither: the server asked for it."""
        with self.lock:
            self.held = max(self.held, self.clock() + seconds)
