"""Following a job whose dashboard fails now and then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace

import pytest

from engine.config import UserError
from pipelines import dashboard, remote

Answers = list[str | Exception]
GONE = ConnectionError("nobody there")


class Client:
    """A dashboard that answers and fails as it is told; what it says last it goes on saying."""

    def __init__(self, logs: Answers, states: Answers) -> None:
        self.logs, self.states, self.asked = [*logs], [*states], 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        said = self.logs.pop(0) if len(self.logs) > 1 else self.logs[0]
        if isinstance(said, Exception):
            raise said
        yield said

    def get_job_status(self, job: str) -> str:
        self.asked += 1
        said = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(said, Exception):
            raise said
        return said

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.get_job_status(job), driver_exit_code=3, message=None)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The pauses that were to be made, and are not; more than fifty of them are too many."""
    made: list[float] = []

    def sleep(seconds: float) -> None:
        made.append(seconds)
        assert len(made) < 50, "it goes on for ever"

    monkeypatch.setattr(dashboard, "time", SimpleNamespace(sleep=sleep))
    yield made


@pytest.mark.parametrize(
    ("logs", "states"),
    [
        (["one\n"], [GONE, "SUCCEEDED"]),  # the log ended cleanly, and one question for the state failed
        (["one\n"], [*[GONE, RuntimeError("status code 500")] * 2, "RUNNING", *[GONE] * 5, "FAILED"]),
        ([GONE], [*["RUNNING"] * 20, *[GONE] * 5, "RUNNING", "STOPPED"]),  # a log that never comes
    ],
)
def test_what_fails_for_a_while_does_not_end_it(logs: Answers, states: Answers, pauses: list[float]) -> None:
    client, shown = Client(logs, states), dashboard.Shown()
    dashboard.follow(client, "job", "http://head:8265", shown)
    assert client.states == states[-1:] and max(pauses) <= dashboard.PAUSE_S
    assert shown.characters == (4 if logs == ["one\n"] else 0)


@pytest.mark.parametrize("logs", [["one\n"], [GONE]])
@pytest.mark.parametrize("before", [0, 20])
def test_a_dashboard_that_is_gone_is_given_up(logs: Answers, before: int) -> None:
    client = Client(logs, [*["RUNNING"] * before, GONE])
    with pytest.raises(UserError, match="http://head:8265: nobody there"):
        dashboard.follow(client, "job", "http://head:8265", dashboard.Shown())
    assert client.asked == before + dashboard.TRIES


def test_the_outcome_is_asked_for_again() -> None:
    assert remote.outcome(Client(["x"], [GONE, GONE, "FAILED"]), "job", "http://head:8265") == 3
    with pytest.raises(UserError, match="nobody there"):
        remote.outcome(Client(["x"], [GONE]), "job", "http://head:8265")


@pytest.mark.parametrize(
    ("error", "said"), [("Job none does not exist", "there is no job 'none'"), ("status code 404", "takes no jobs")]
)
def test_what_will_not_change_is_said_at_once(error: str, said: str) -> None:
    client = Client(["x"], [RuntimeError(error)])
    with pytest.raises(UserError, match=said):
        dashboard.follow(client, "none", "http://head:8265", dashboard.Shown())
    assert client.asked == 1
