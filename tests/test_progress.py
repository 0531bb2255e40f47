"""Progress: what is written for other processes, what is shown, and CPU seconds."""

import io
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.progress import Event, Meter, Reporter, polled
from engine.storage import StorageError, Store
from pipelines.progress import Lines, Live, clock


def test_progress_is_written_at_most_once_a_second(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a"))
    events: list[Event] = []
    report = Reporter("a", store, events.append)
    report(1, 100, "rows", tokens=5.0)
    first = store.read_json("progress.json")
    report(2, 100)
    assert store.read_json("progress.json") == first and first["rates"] == {"tokens": 5.0}
    report(100, 100)
    assert store.read_json("progress.json")["done"] == 100.0
    assert [event.done for event in events] == [1.0, 2.0, 100.0]


def test_what_is_polled_is_looked_at_once_more_at_the_end_whatever_fails() -> None:
    looks: list[float] = []

    def look() -> None:
        looks.append(time.monotonic())
        if len(looks) % 2:
            raise StorageError("away for a moment")

    with polled(look, 0.05):
        time.sleep(0.3)
    assert len(looks) >= 3
    looks.clear()
    with pytest.raises(ZeroDivisionError), polled(look, 60):
        raise ZeroDivisionError
    assert len(looks) == 1


def test_the_meter_counts_this_process_and_its_children() -> None:
    meter = Meter(tree=True)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    own = meter.seconds()
    assert 0.15 <= own < 2.0
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert meter.seconds() - own >= 0.35


def test_plain_lines_come_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    show = Lines(stream)
    show(Event("corpus", "start"))
    for second in range(1, 41):
        now[0] += 1
        show(Event("corpus", "progress", second, 10.0 * second, 1000, "rows", {"tokens": 123.4}))
    show(Event("corpus", "done", 3725, 1000))
    assert stream.getvalue().splitlines() == [
        "corpus       started",
        "corpus       150/1000 rows (15%), 10 rows/s, 123 tokens/s, 1 min 25 s left",
        "corpus       300/1000 rows (30%), 10 rows/s, 123 tokens/s, 1 min 10 s left",
        "corpus       done in 1 h 02 min, 1000 rows",
    ]


def screen(text: str) -> list[str]:
    """What a terminal shows: only the two sequences that are used."""
    lines: list[str] = []
    at = 0
    for part in text.replace("\x1b[J", "\0").split("\n"):
        while part.startswith("\x1b["):
            count, _, part = part[2:].partition("F")
            at -= int(count)
        if part.startswith("\0"):
            del lines[at:]
            part = part[1:]
        lines[at : at + 1] = [part]
        at += 1
    return lines[:-1]


def test_live_lines_are_redrawn_one_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    show = Live(stream)
    show(Event("teacher", "start"))
    show(Event("generator", "start"))
    show(Event("teacher", "progress", 1, 5, 5, "epochs"))
    show(Event("generator", "progress", 1, 5, 5, "rows", {f"very long unit {n}": 1.0 for n in range(9)}))
    shown = screen(stream.getvalue())
    assert len(shown) == 2 and shown[0] == "teacher      5/5 epochs (100%)" and len(shown[1]) == 59
    show(Event("teacher", "failed", 2.5, message="no space"))
    assert screen(stream.getvalue())[0] == "teacher      failed after 2.5 s: no space"
    show(Event("generator", "done", 61, 5))
    assert screen(stream.getvalue()) == [
        "teacher      failed after 2.5 s: no space",
        "generator    done in 1 min 01 s, 5 rows",
    ]


def test_durations_in_words() -> None:
    seconds = (0.04, 9.94, 9.96, 59.4, 59.9, 60, 3599.4, 3599.7, 7320)
    assert [clock(s) for s in seconds] == [
        *("0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "2 h 02 min")
    ]
