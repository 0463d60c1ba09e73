"""Cases in order of importance until the time is up: what was left out is listed, never silently missing."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.result import Row

_REPEAT_S = 2.0  # some libraries catch whatever reaches them and go on
_SOON_S = 1e-3  # zero would switch the timer off


class OutOfTimeError(BaseException):
    """The time is up; no Exception, so that nothing on the way takes it for a failed attempt of its own."""


@dataclass(frozen=True)
class Task:
    """One case.

    Attributes:
        benchmark: the result that its rows belong to.
        label: what it measures, for people.
        estimate_s: seconds it is expected to take; it is not begun with less.
        run: measures.
    """

    benchmark: str
    label: str
    estimate_s: float
    run: Callable[[], list[Row]]


@dataclass
class Budget:
    """Seconds from now, for everything."""

    total_s: float
    started: float = field(default_factory=time.monotonic)

    @property
    def remaining_s(self) -> float:
        return self.total_s - (time.monotonic() - self.started)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the main thread after some seconds; in another thread there is no limit.

    Limits nest: an outer one that is shorter also ends what is inside.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise OutOfTimeError

    started = time.monotonic()
    before = signal.signal(signal.SIGALRM, stop)
    outer_s, _ = signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, max(min(seconds, outer_s or seconds), _SOON_S), _REPEAT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if outer_s:
            left_s = outer_s - (time.monotonic() - started)
            signal.setitimer(signal.ITIMER_REAL, max(left_s, _SOON_S), _REPEAT_S)


def run_tasks(
    tasks: Sequence[Task], budget: Budget, progress: Callable[[str], None], done: Callable[[Task, list[Row]], None]
) -> list[str]:
    """Run the tasks that fit, in their order.

    Args:
        tasks: the most important first.
        budget: what there is.
        progress: called with one line per task.
        done: called with each task that ended and its rows.

    Returns:
        One line for each task that was left out or cut off.
    """
    left_out = []
    for task in tasks:
        remaining_s = budget.remaining_s
        if remaining_s < task.estimate_s:
            left_out.append(f"{task.benchmark}: {task.label}: about {task.estimate_s:.0f} s were needed")
            continue
        progress(f"{task.benchmark}: {task.label}")
        try:
            with time_limit(remaining_s):
                rows = task.run()
        except OutOfTimeError:
            left_out.append(f"{task.benchmark}: {task.label}: the time was up before it was done")
            continue
        except Exception as error:  # noqa: BLE001 - one case that breaks must not cost the others
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            progress(f"{task.label}: {text}")
            rows = [failed_row(task, text)]
        done(task, rows)
    return left_out


def failed_row(task: Task, reason: str) -> Row:
    """The row of a case that has no number."""
    return Row(task.label, "measured", "x", None, reason=reason)
