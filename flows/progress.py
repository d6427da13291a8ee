"""Progress of a build on the console: a bar a stage on a terminal, otherwise a plain line now and then."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from flows.words import count_text

# Seconds between two plain lines of one stage.
QUIET = 10.0


@dataclass
class Meter:
    """Work of one stage: `total` things of a `noun`, `before` of them done by earlier runs, `done` in this.

    Only this run's work counts for the rate, from the moment when its first unit was handed out. A stage that
    `follows` another takes its units one by one as that has made them.
    """

    stage: str
    noun: str
    total: int
    before: int = 0
    done: int = 0
    follows: "Meter | None" = None
    started: float | None = None
    clock: Callable[[], float] = time.monotonic
    finished: float | None = None
    shown: float = field(default=-QUIET)

    def start(self) -> None:
        """Note that work begins now, unless it has begun."""
        if self.started is None:
            self.started = self.clock()

    def advance(self, count: int) -> None:
        """Add finished work."""
        self.done += count
        if self.complete:
            self.finished = self.clock()

    @property
    def position(self) -> int:
        """Things done so far, by this run and earlier ones."""
        return min(self.before + self.done, self.total)

    @property
    def complete(self) -> bool:
        """Whether nothing is left."""
        return self.before + self.done >= self.total

    @property
    def rate(self) -> float | None:
        """Things a second in this run; None before the first."""
        if self.started is None or not self.done:
            return None
        return self.done / max((self.finished or self.clock()) - self.started, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at this rate, but no less than the stage that it follows takes.

        None while one of them is unknown: this stage may have been quick with what an earlier run has left.
        """
        own = (self.total - self.position) / self.rate if self.rate else None
        if self.follows is None or self.follows.complete:
            return own
        before = self.follows.seconds_left
        return None if own is None or before is None else max(own, before)

    def describe(self) -> str:
        """Return rate and time left in words: `18.2 images/s, 0:42 left`."""
        if self.complete and not self.done:
            return "done before"
        if self.rate is None:
            return "waiting" if self.started is None else "running"
        rate = f"{self.rate:,.1f} {self.noun}/s"
        if self.complete:
            return f"{rate}, done"
        return rate if self.seconds_left is None else f"{rate}, {clock_text(self.seconds_left)} left"


def clock_text(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss; from a day on as days and hours."""
    if seconds >= 24 * 3600:
        days, hours = divmod(round(seconds / 3600), 24)
        return f"{count_text(days, 'day')} {hours} h"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class Reporter:
    """What a build tells: `started(stage)` and `committed(stage, count)`. Safe to call from any thread."""

    started: Callable[[str], None]
    committed: Callable[[str, int], None]


@contextmanager
def show_progress(title: str, meters: Sequence[Meter], console: Console) -> Iterator[Reporter]:
    """Show the meters on `console` while the block runs: as bars on a terminal, else as lines."""
    by_stage = {meter.stage: meter for meter in meters}
    lock = threading.Lock()
    display = _bars(title, meters, console) if console.is_terminal else _lines(title, console)

    with display as refresh:

        def started(stage: str) -> None:
            with lock:
                by_stage[stage].start()
                refresh(by_stage[stage])

        def committed(stage: str, count: int) -> None:
            with lock:
                by_stage[stage].advance(count)
                refresh(by_stage[stage])

        yield Reporter(started, committed)


class CallbackBar(AbstractContextManager["CallbackBar"]):
    """Progress of work that calls it with (done, total) or (done, total, loss), as trainings do.

    The first call tells how much an earlier run had done, which says nothing of this run's rate; a call with
    another total starts a new bar.
    """

    def __init__(self, stage: str, noun: str):
        self.stage, self.noun = stage, noun
        self._shown = ExitStack()
        self._meter: Meter | None = None

    def __call__(self, done: int, total: int, loss: float = 0.0) -> None:
        """Show that `done` things of `total` are done."""
        if self._meter is None or self._meter.total != total:
            self._shown.close()
            self._meter = Meter(self.stage, self.noun, total, before=done)
            self._reporter = self._shown.enter_context(show_progress("", [self._meter], Console()))
            self._reporter.started(self.stage)
        else:
            self._reporter.committed(self.stage, done - self._meter.position)

    def __exit__(self, *exception: Any) -> None:
        self._shown.close()


class _MeterColumn(ProgressColumn):
    """Rate and time left of a meter."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["meter"].describe(), style="cyan")


@contextmanager
def _bars(title: str, meters: Sequence[Meter], console: Console) -> Iterator[Callable[[Meter], None]]:
    columns = (
        TextColumn("[bold]{task.description:<11}"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:>7,.0f}/{task.total:,.0f} {task.fields[meter].noun}"),
        _MeterColumn(),
    )
    console.print(f"[bold]{title}[/bold]")
    with Progress(*columns, console=console) as progress:
        tasks = {
            meter.stage: progress.add_task(
                meter.stage, total=meter.total, completed=meter.position, meter=meter
            )
            for meter in meters
        }
        yield lambda meter: progress.update(tasks[meter.stage], completed=meter.position)


@contextmanager
def _lines(title: str, console: Console) -> Iterator[Callable[[Meter], None]]:
    console.print(title, highlight=False)

    def refresh(meter: Meter) -> None:
        now = meter.clock()
        if not meter.done or (now - meter.shown < QUIET and not meter.complete):
            return
        meter.shown = now
        console.print(
            f"  {meter.stage:<11} {meter.position:,}/{meter.total:,} {meter.noun}, {meter.describe()}",
            highlight=False,
            soft_wrap=True,
        )

    yield refresh
