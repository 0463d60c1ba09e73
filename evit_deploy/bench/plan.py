"""How much measuring fits into the time that is left: pure arithmetic on estimated costs.

A process-round starts one fresh process per arm, then works through the batch sizes in ascending order; for each it
prepares every arm and runs one or more rounds; a round measures every arm once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evit_deploy.bench.statistics import MIN_PROCESSES

ESTIMATE_CALLS = 3  # of the reference: what fits is planned by the least of them, an arm's own rounds correct it
MARGIN = 1.15  # how much more time than estimated is set aside


@dataclass(frozen=True)
class Effort:
    """How much is measured where time allows.

    Attributes:
        target_processes: process-rounds.
        max_rounds: rounds per batch size in each process-round.
        warmup_calls, warmup_s: before the timed calls of an arm-round, both at least.
        min_calls, min_round_s: timed calls of an arm-round and their duration, both at least.
    """

    target_processes: int = 5
    max_rounds: int = 20
    warmup_calls: int = 2
    warmup_s: float = 0.05  # longer than the threads of the arm before it keep spinning
    min_calls: int = 3
    min_round_s: float = 0.15

    def arm_round_s(self, call_s: float) -> float:
        """Estimated seconds of one round of one arm that takes `call_s` per call."""
        warmup_s = max(self.warmup_calls * call_s, self.warmup_s + call_s)
        return warmup_s + max(self.min_calls * call_s, self.min_round_s + call_s)


@dataclass(frozen=True)
class BlockCost:
    """Estimated seconds of one batch size in one process-round, all arms together."""

    prepare_s: float
    round_s: float


@dataclass(frozen=True)
class Plan:
    """What the remaining time allows.

    Attributes:
        processes: process-rounds still to do, 0 if nothing fits.
        rounds: per batch size the rounds of each process-round, ascending; batch sizes that do not fit are absent.
        missing_s: per batch size that does not fit, the seconds by which the budget is too short.
    """

    processes: int
    rounds: dict[int, int]
    missing_s: dict[int, float]


def plan_rest(
    remaining_s: float,
    *,
    startup_s: float,
    blocks: Mapping[int, BlockCost],
    processes_done: int,
    effort: Effort,
) -> Plan:
    """Divide the remaining time.

    Batch sizes are admitted in ascending order as long as two process-rounds in total fit. Then as many process-rounds
    as possible up to the target, then more rounds for the batch size that has had the least time.

    Args:
        remaining_s: seconds left for process-rounds.
        startup_s: seconds until all processes of one process-round are ready.
        blocks: cost per batch size.
        processes_done: process-rounds already finished.
        effort: what is wanted.
    """
    needed = max(1, MIN_PROCESSES - processes_done)
    remaining_s /= MARGIN
    rounds: dict[int, int] = {}
    missing_s: dict[int, float] = {}
    block_s = 0.0
    for batch in sorted(blocks):
        cost_s = needed * (startup_s + block_s + blocks[batch].prepare_s + blocks[batch].round_s)
        if missing_s or cost_s > remaining_s:
            missing_s[batch] = (cost_s - remaining_s) * MARGIN
        else:
            rounds[batch] = 1
        # A batch that does not fit still counts: what the next larger one lacks is the cost of both.
        block_s += blocks[batch].prepare_s + blocks[batch].round_s
    if not rounds or processes_done >= effort.target_processes:
        return Plan(0, {}, missing_s)
    block_s = sum(blocks[b].prepare_s + blocks[b].round_s for b in rounds)
    affordable = int(remaining_s / (startup_s + block_s)) if startup_s + block_s > 0 else effort.target_processes
    processes = max(needed, min(affordable, effort.target_processes - processes_done))
    spare_s = remaining_s / processes - startup_s - block_s
    while True:
        cheapest = min(
            (b for b in rounds if rounds[b] < effort.max_rounds and blocks[b].round_s <= spare_s),
            key=lambda b: (rounds[b] + 1) * blocks[b].round_s,
            default=None,
        )
        if cheapest is None:
            return Plan(processes, rounds, missing_s)
        rounds[cheapest] += 1
        spare_s -= blocks[cheapest].round_s
