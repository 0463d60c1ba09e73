"""One arm of a running benchmark: its samples, its estimated costs, and the batch sizes it has lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evit_deploy.backends import Backend
from evit_deploy.bench.statistics import MIN_PROCESSES

CACHED_SHARE = 0.5  # of a first call's extra cost that later processes pay: compilers find most of it in their cache


@dataclass(frozen=True)
class RoundSample:
    """The calls of one arm in one round of one process."""

    process: int
    round: int
    latencies_s: tuple[float, ...]


@dataclass(frozen=True)
class Lost:
    """Why an arm is not measured (any further) in a batch size.

    Attributes:
        status: "skipped" or "failed".
        reason: one line.
        over_budget: the time budget is the reason.
    """

    status: str
    reason: str
    over_budget: bool = False


@dataclass
class ArmState:
    """One arm and everything learned about it; lists and dicts are per batch size unless noted.

    Attributes:
        name: row name; differs from `arm.name` for the A/A copy.
        arm: what runs.
        precision: what it executes, as its first process read it back.
        graph_precision: what its graph says, which decides the tolerance.
        notes: what its first process said about how it runs.
        versions: of the libraries its first process had loaded, by name.
        load_s: seconds until each process was ready, per process.
        lost: batch sizes it is no longer measured in.
        samples: the arm-rounds.
        first_call_s: first call of each process; includes compilation.
        call_s: newest estimate of one call.
        peak_memory_bytes: largest of all processes.
        outputs: files with the output of each process's first call.
        checked: the file with the outputs of more images, from one process, and how many rows they should have.
    """

    name: str
    arm: Backend
    precision: str | None = None
    graph_precision: str | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    load_s: list[float] = field(default_factory=list)
    lost: dict[int, Lost] = field(default_factory=dict)
    samples: dict[int, list[RoundSample]] = field(default_factory=dict)
    first_call_s: dict[int, list[float]] = field(default_factory=dict)
    call_s: dict[int, float] = field(default_factory=dict)
    peak_memory_bytes: dict[int, int] = field(default_factory=dict)
    outputs: dict[int, list[Path]] = field(default_factory=dict)
    checked: dict[int, tuple[Path, int]] = field(default_factory=dict)

    def takes(self, batch: int) -> bool:
        """Whether this batch size is still to be measured."""
        return batch not in self.lost

    def give_up(self, batches: Sequence[int], lost: Lost) -> None:
        """Lose these batch sizes, unless they are lost already."""
        for batch in batches:
            self.lost.setdefault(batch, lost)

    def processes(self, batch: int) -> int:
        """Number of processes the batch size was measured in."""
        return len({sample.process for sample in self.samples.get(batch, [])})

    def scaled_call_s(self, batch: int) -> float | None:
        """Seconds per call; from the next smaller known batch size in proportion; None if none is known."""
        known = [b for b in self.call_s if b <= batch]
        return self.call_s[max(known)] * batch / max(known) if known else None

    def next_extra_s(self, batch: int) -> float:
        """What the next process's first call is expected to cost beyond an ordinary call.

        Before anything is known about a batch size it is the most that another one cost.
        """
        seen = self.first_call_s.get(batch, [])
        if len(seen) > 1:
            return self._extra_s(batch, seen[-1])
        if seen:
            return CACHED_SHARE * self._extra_s(batch, seen[0])
        return max((self._extra_s(b, calls[0]) for b, calls in self.first_call_s.items()), default=0.0)

    def committed_extra_s(self) -> float:
        """The extra cost of first calls so far, with what it takes until every seen batch size has two processes."""
        total_s = 0.0
        for batch, calls in self.first_call_s.items():
            total_s += sum(self._extra_s(batch, first) for first in calls)
            if len(calls) < MIN_PROCESSES and self.takes(batch):
                total_s += self.next_extra_s(batch)
        return total_s

    def _extra_s(self, batch: int, first_call_s: float) -> float:
        return max(0.0, first_call_s - self.call_s.get(batch, first_call_s))
