"""Progress: rates count this run's work alone, and plain lines say what bars do."""

import io

import pytest
from rich.console import Console

from flows.progress import Meter, clock_text, show_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rate_and_time_left_count_this_runs_work_from_its_first_unit():
    clock = Clock()
    meter = Meter("samples", "images", total=100, before=40, clock=clock)
    assert meter.describe() == "waiting"
    clock.now = 200.0
    meter.start()
    assert meter.describe() == "running"
    clock.now = 210.0
    meter.advance(20)
    assert (meter.position, meter.rate, meter.seconds_left) == (60, 2.0, 20.0)
    assert meter.describe() == "2.0 images/s, 0:20 left"


def test_a_stage_that_follows_another_is_not_done_before_it():
    """Aligning takes a second where sampling takes a minute: most of its time left is spent waiting."""
    clock = Clock()
    sampled = Meter("samples", "images", total=10, clock=clock)
    aligned = Meter("aligned", "images", total=10, before=2, follows=sampled, clock=clock)
    sampled.start()
    aligned.start()
    clock.now += 1
    aligned.advance(1)  # of what an earlier run has sampled: how long sampling takes is not known yet
    assert aligned.seconds_left is None
    assert aligned.describe() == "1.0 images/s"
    clock.now += 59
    sampled.advance(1)
    clock.now += 1
    aligned.advance(1)
    assert aligned.seconds_left == pytest.approx(sampled.seconds_left) == pytest.approx(9 * 61)
    assert aligned.describe().endswith("9:09 left")
    sampled.advance(9)
    assert aligned.seconds_left == pytest.approx(6 * 61 / 2)


def test_the_rate_stands_when_the_stage_is_done():
    clock = Clock()
    meter = Meter("samples", "images", total=10, clock=clock)
    meter.start()
    clock.now += 5
    meter.advance(10)
    clock.now += 1000
    assert meter.describe() == "2.0 images/s, done"


def test_work_of_earlier_runs_is_called_so():
    assert Meter("samples", "images", total=10, before=10).describe() == "done before"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (3725, "1:02:05"),
        (86_399, "23:59:59"),
        (90_000, "1 day 1 h"),
        (29_221_000, "338 days 5 h"),
    ],
)
def test_durations_are_written_as_clocks_do(seconds, text):
    assert clock_text(seconds) == text


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_and_lines_both_show_stage_rate_and_end(terminal):
    out = io.StringIO()
    clock = Clock()
    meter = Meter("samples", "images", total=64, clock=clock)
    console = Console(file=out, force_terminal=terminal, width=110)
    with show_progress("demo in store", [meter], console) as reporter:
        reporter.started("samples")
        for _ in range(8):
            clock.now += 1
            reporter.committed("samples", 8)
    text = out.getvalue()
    assert "demo in store" in text
    assert "64/64 images" in text
    assert "8.0 images/s, done" in text


def test_plain_lines_come_at_most_every_ten_seconds():
    out = io.StringIO()
    clock = Clock()
    meter = Meter("samples", "images", total=1000, clock=clock)
    with show_progress("demo", [meter], Console(file=out, width=110)) as reporter:
        reporter.started("samples")
        for _ in range(50):
            clock.now += 1
            reporter.committed("samples", 1)
    assert len(out.getvalue().splitlines()) == 1 + 5
