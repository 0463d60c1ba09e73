"""Run the arms: process-rounds of fresh processes, shuffled order, one measuring at a time, within the time budget."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evit_deploy.backends import Backend
from evit_deploy.bench.plan import (
    ESTIMATE_CALLS,
    MARGIN,
    BlockCost,
    Effort,
    Plan,
    plan_rest,
)
from evit_deploy.bench.process import WorkerError, WorkerHandle
from evit_deploy.bench.state import CACHED_SHARE, ArmState, Lost, RoundSample
from evit_deploy.bench.statistics import MIN_PROCESSES

Launch = Callable[[Backend, str], WorkerHandle]

LOAD_SHARE = 1 / 3  # of the budget, for loading one arm
EXTRA_SHARE = 1 / 2  # of the budget, for what the first calls of one arm cost beyond ordinary calls (compilation)
HANG_FACTOR = 10.0  # an arm-round that takes this many times its estimate, and HANG_FLOOR_S, is given up
HANG_FLOOR_S = 10.0
CHECK_SHARE = 1 / 50  # of the remaining time, for the outputs of more images of one arm at one batch size
FREE_EXTRA_S = 3.0  # a first call may always cost this much more than an ordinary one: no compilation is that short
TEARDOWN_S = 0.8  # kept back for ending the processes and the statistics
_COMPILE_HINT = "give it more time or fewer batch sizes, or run again: the compiler's cache keeps what is done"


class Schedule:
    """One benchmark run.

    Args:
        states: the arms, the A/A copy among them.
        reference: the arm whose outputs are the truth.
        launch: starts a worker from an arm and a label.
        make_inputs: writes the inputs of a batch size, once; returns the arguments that `prepare` takes for them.
        make_checks: the same for `check`: images to compare beside those of `prepare`; None where there are none.
        batches: batch sizes, ascending.
        duration_s: the whole budget.
        started: reading of `clock` when the budget began.
        seed: of the shuffling.
        progress: called with one line at a time.
        clock: monotonic seconds.
        effort: how much to measure; None stands for the defaults.
    """

    def __init__(
        self,
        states: Sequence[ArmState],
        reference: ArmState,
        launch: Launch,
        *,
        make_inputs: Callable[[int], dict[str, Any]],
        make_checks: Callable[[int], dict[str, Any] | None] = lambda batch: None,
        batches: Sequence[int],
        duration_s: float,
        started: float,
        seed: int = 0,
        progress: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        effort: Effort | None = None,
    ) -> None:
        self.states = list(states)
        self.reference = reference
        self.batches = list(batches)
        self.processes_done = 0
        self.idle_s = 0.0
        self.idle_cpu_s = 0.0
        self._launch = launch
        self._make_inputs = make_inputs
        self._make_checks = make_checks
        self._duration_s = duration_s
        self._end = started + duration_s - min(TEARDOWN_S, duration_s / 4)
        self._random = random.Random(seed)
        self._say = progress or (lambda line: None)
        self._clock = clock
        self.effort = effort or Effort()
        self._startup_s = 0.0

    def run(self) -> None:
        """Reference first, then process-rounds until the plan or the budget is done."""
        self._run_reference()
        while True:
            plan, participants = self._plan()
            self._lose_what_does_not_fit(plan)
            if plan.processes == 0:
                return
            rounds = ", ".join(f"batch {batch}: {count}" for batch, count in plan.rounds.items())
            total = self.processes_done + plan.processes
            self._say(f"fresh processes, {self.processes_done + 1} of {total} (rounds per {rounds})")
            self._process_round(plan, participants)
            self.processes_done += 1

    def remaining_s(self) -> float:
        """Seconds until measuring must have ended."""
        return self._end - self._clock()

    def _run_reference(self) -> None:
        self._say("reference: PyTorch FP32 on the CPU")
        started = self._clock()
        state = self.reference
        workers = {state.name: self._launch(state.arm, "reference")}
        try:
            self._guarded(state, workers, self.batches, lambda worker: self._become_ready(state, worker))
            # The arms load at the same time on few cores.
            self._startup_s = (self._clock() - started) * max(1.0, len(self.states) / _cores())
            for batch in self.batches:
                if state.name not in workers or batch not in self._plan()[0].rounds:
                    return
                self._guarded(state, workers, [batch], lambda worker, b=batch: self._prepare(state, worker, b))  # type: ignore[misc]
        finally:
            for worker in workers.values():
                worker.close()

    def _plan(self) -> tuple[Plan, list[ArmState]]:
        """The plan for the rest, and who takes part in the next process-round.

        Where an arm that compiles for long would cost all arms process-rounds, it is measured in as few as will do.
        """
        everyone = self._plan_for(self.states, self.remaining_s())
        costly = [state for state in self.states if self._extra_s(state) > FREE_EXTRA_S]
        if not costly or self.processes_done + everyone.processes >= self.effort.target_processes:
            return everyone, self.states
        others = [state for state in self.states if state not in costly]
        needed = max(0, MIN_PROCESSES - self.processes_done)
        one_off_s = needed * sum(
            self._prepare_estimate_s(state, batch) + 3 * self.effort.arm_round_s(self._call_estimate_s(state, batch))
            for state in costly
            for batch in self.batches
            if state.takes(batch)
        )
        rest = self._plan_for(others, self.remaining_s() - one_off_s)
        if not rest.missing_s and rest.processes > everyone.processes:
            return rest, self.states if needed else others
        return everyone, self.states

    def _extra_s(self, state: ArmState) -> float:
        return sum(state.next_extra_s(batch) for batch in self.batches if state.takes(batch))

    def _plan_for(self, states: Sequence[ArmState], remaining_s: float) -> Plan:
        blocks = {}
        for batch in self.batches:
            live = [state for state in states if state.takes(batch)]
            if live:
                blocks[batch] = BlockCost(
                    prepare_s=sum(self._prepare_estimate_s(state, batch) for state in live),
                    round_s=sum(self.effort.arm_round_s(self._call_estimate_s(state, batch)) for state in live),
                )
        return plan_rest(
            remaining_s,
            startup_s=self._startup_s,
            blocks=blocks,
            processes_done=self.processes_done,
            effort=self.effort,
        )

    def _call_estimate_s(self, state: ArmState, batch: int) -> float:
        """The arm's own call, else the reference's."""
        own = state.call_s.get(batch)
        if own is not None:
            return own
        return self.reference.scaled_call_s(batch) or state.scaled_call_s(batch) or 0.0

    def _prepare_estimate_s(self, state: ArmState, batch: int) -> float:
        return 2 * self._call_estimate_s(state, batch) + state.next_extra_s(batch)

    def _lose_what_does_not_fit(self, plan: Plan) -> None:
        for batch, missing_s in plan.missing_s.items():
            if any(state.samples.get(batch) for state in self.states):
                continue  # measured in one process: its row says so instead of being taken back
            # The reference would have to run these batch sizes as well.
            unseen = [b for b in self.batches if b <= batch and b not in self.reference.call_s]
            missing_s += MARGIN * sum((1 + ESTIMATE_CALLS) * self._call_estimate_s(self.reference, b) for b in unseen)
            needed_s = _round_up(self._duration_s + missing_s)
            reason = f"does not fit into the budget of {self._duration_s:g} s: about {needed_s} s are needed"
            for state in self.states:
                state.give_up([batch], Lost("skipped", reason, over_budget=True))

    def _process_round(self, plan: Plan, participants: Sequence[ArmState]) -> None:
        order = self._shuffled([state for state in participants if any(state.takes(batch) for batch in plan.rounds)])
        workers: dict[str, WorkerHandle] = {}
        started = self._clock()
        try:
            for state in order:
                label = f"arm{self.states.index(state)}-process{self.processes_done}"
                workers[state.name] = self._launch(state.arm, label)
            for state in order:
                self._guarded(state, workers, self.batches, lambda worker, s=state: self._become_ready(s, worker))  # type: ignore[misc]
            self._startup_s = self._clock() - started
            for batch, rounds in plan.rounds.items():
                self._block(order, workers, batch, rounds)
        finally:
            for worker in workers.values():
                worker.close()

    def _block(self, order: Sequence[ArmState], workers: dict[str, WorkerHandle], batch: int, rounds: int) -> None:
        """One batch size in one process-round: prepare every arm, then the interleaved rounds."""
        from_here = [b for b in self.batches if b >= batch]

        def live() -> list[ArmState]:
            return self._shuffled([state for state in order if state.name in workers and state.takes(batch)])

        for state in live():
            if self._prepare_estimate_s(state, batch) > self.remaining_s():
                return
            if self._affords_first_call(state, batch):
                self._guarded(state, workers, from_here, lambda worker, s=state: self._prepare(s, worker, batch))  # type: ignore[misc]
        for index in range(rounds):
            round_s = sum(self.effort.arm_round_s(self._call_estimate_s(state, batch)) for state in live())
            if not live() or round_s * MARGIN > self.remaining_s():
                return
            for state in live():
                self._guarded(
                    state,
                    workers,
                    from_here,
                    lambda worker, s=state, i=index: self._measure(s, worker, batch, i),  # type: ignore[misc]
                )

    def _affords_first_call(self, state: ArmState, batch: int) -> bool:
        """Whether compiling this batch size in two processes fits into the arm's share; if not, it is lost."""
        extra_s = state.next_extra_s(batch)
        if state.processes(batch) >= MIN_PROCESSES or extra_s <= max(FREE_EXTRA_S, self._extra_left_s(state, batch)):
            return True
        reason = (
            f"preparing batch {batch} (compilation) would take about {extra_s:.0f} s, too long for the budget of "
            f"{self._duration_s:g} s: {_COMPILE_HINT}"
        )
        state.give_up([b for b in self.batches if b >= batch], Lost("skipped", reason, over_budget=True))
        self._say(f"{state.name}: {reason}")
        return False

    def _extra_left_s(self, state: ArmState, batch: int) -> float:
        """The most that the next first call may cost beyond an ordinary call."""
        left_s = min(
            self._duration_s * EXTRA_SHARE - state.committed_extra_s(),
            self.remaining_s() - MARGIN * self._reserved_s(),
        )
        seen = len(state.first_call_s.get(batch, []))
        if seen:
            return left_s + (state.next_extra_s(batch) if seen < MIN_PROCESSES else 0.0)
        return left_s / (1.0 + CACHED_SHARE)

    def _reserved_s(self) -> float:
        """What it takes until every arm has been measured in two processes, extra costs of first calls aside."""
        processes = max(0, MIN_PROCESSES - self.processes_done)
        block_s = 0.0
        for batch in self.batches:
            calls_s = [self._call_estimate_s(state, batch) for state in self.states if state.takes(batch)]
            block_s += sum(2 * call_s + self.effort.arm_round_s(call_s) for call_s in calls_s)
        return processes * block_s + max(0, processes - 1) * self._startup_s

    def _guarded(
        self,
        state: ArmState,
        workers: dict[str, WorkerHandle],
        batches: Sequence[int],
        action: Callable[[WorkerHandle], None],
    ) -> None:
        """Do something with an arm's worker; a failure costs the arm these batch sizes, and the others nothing."""
        if state.name not in workers:
            return
        try:
            action(workers[state.name])
        except WorkerError as error:
            workers.pop(state.name).close()
            if error.timed_out:
                lost = Lost("skipped", f"{error.reason} (budget {self._duration_s:g} s)", over_budget=True)
            else:
                lost = Lost("skipped" if error.missing else "failed", error.reason)
            state.give_up(batches, lost)
            self._say(f"{state.name}: {lost.reason}")

    def _become_ready(self, state: ArmState, worker: WorkerHandle) -> None:
        patience_s = max(0.0, min(self.remaining_s(), self._duration_s * LOAD_SHARE))
        ready = _in_time(lambda: worker.receive(patience_s), f"was still loading after {patience_s:.0f} s")
        state.load_s.append(ready["load_s"])
        state.precision = state.precision or ready["precision"]
        state.graph_precision = state.graph_precision or ready["graph_precision"]
        state.notes = state.notes or tuple(ready["notes"])
        state.versions = state.versions or ready["versions"]

    def _prepare(self, state: ArmState, worker: WorkerHandle, batch: int) -> None:
        self._say(f"{state.name}: first call at batch {batch}")
        estimate_calls = ESTIMATE_CALLS if state is self.reference else 1
        command = {
            "command": "prepare",
            "batch": batch,
            "estimate_calls": estimate_calls,
            **self._make_inputs(batch),
        }
        calls_s = HANG_FACTOR * self._call_estimate_s(state, batch)
        extra_s = max(FREE_EXTRA_S, self._extra_left_s(state, batch))
        patience_s = max(0.0, min(self.remaining_s(), extra_s + calls_s))
        reply = _in_time(
            lambda: self._request(worker, command, patience_s),
            f"preparing batch {batch} (compilation) was not done after {patience_s:.0f} s: {_COMPILE_HINT}",
        )
        state.call_s[batch] = reply["call_s"]
        state.first_call_s.setdefault(batch, []).append(reply["first_call_s"])
        state.outputs.setdefault(batch, []).append(Path(reply["outputs"]))
        self._check(state, worker, batch)

    def _check(self, state: ArmState, worker: WorkerHandle, batch: int) -> None:
        """More images than a batch has, in one process of an arm, as many as a share of the time allows."""
        inputs = None if batch in state.checked else self._make_checks(batch)
        if inputs is None:
            return
        share_s = CHECK_SHARE * self.remaining_s()
        calls = min(inputs["calls"], int(share_s / max(state.call_s[batch], 1e-6)))
        if calls < 1:
            return
        command = {"command": "check", "batch": batch, **inputs, "calls": calls}
        patience_s = max(0.0, min(self.remaining_s(), max(HANG_FLOOR_S, HANG_FACTOR * share_s)))
        reply = _in_time(
            lambda: self._request(worker, command, patience_s),
            f"the outputs of {calls * batch} images at batch {batch} were not there after {patience_s:.0f} s",
        )
        state.checked[batch] = Path(reply["outputs"]), reply["rows"]

    def _measure(self, state: ArmState, worker: WorkerHandle, batch: int, index: int) -> None:
        command = {
            "command": "measure",
            "warmup_calls": self.effort.warmup_calls,
            "warmup_s": self.effort.warmup_s,
            "min_calls": self.effort.min_calls,
            "min_s": self.effort.min_round_s,
            "max_s": max(0.0, self.remaining_s()),
        }
        estimate_s = self.effort.arm_round_s(self._call_estimate_s(state, batch))
        patience_s = max(0.0, min(self.remaining_s(), max(HANG_FLOOR_S, HANG_FACTOR * estimate_s)))
        reply = _in_time(
            lambda: self._request(worker, command, patience_s),
            f"a round of batch {batch} was not done after {patience_s:.0f} s",
        )
        latencies_s = tuple(reply["latencies_s"])
        if len(latencies_s) < self.effort.min_calls:
            return  # the budget ended within this arm-round
        state.samples.setdefault(batch, []).append(RoundSample(self.processes_done, index, latencies_s))
        state.call_s[batch] = sum(latencies_s) / len(latencies_s)
        peak = reply["peak_memory_bytes"]
        if peak is not None:
            state.peak_memory_bytes[batch] = max(state.peak_memory_bytes.get(batch, 0), peak)

    def _request(self, worker: WorkerHandle, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        reply = worker.request(command, timeout_s)
        self.idle_s += reply["idle_s"]
        self.idle_cpu_s += reply["idle_cpu_s"]
        return reply

    def _shuffled(self, states: Sequence[ArmState]) -> list[ArmState]:
        shuffled = list(states)
        self._random.shuffle(shuffled)
        return shuffled


def _in_time(action: Callable[[], dict[str, Any]], late: str) -> dict[str, Any]:
    """The reply; a WorkerError for lateness says what was late."""
    try:
        return action()
    except WorkerError as error:
        if error.timed_out:
            raise WorkerError(late, timed_out=True) from None
        raise


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _round_up(seconds: float) -> int:
    """To a number a person would type: the next multiple of 5 s."""
    return int(-(-seconds // 5) * 5)
