"""One backend as data: what it runs, what it needs, and the function that makes its runner."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

Default = Literal["always", "where it runs", "never"]

NO_TRANSFERS = "none (CPU)"
TRANSFERS_INCLUDED = "host to device and back, within the latency"


@dataclass(frozen=True)
class BackendContext:
    """What a factory gets.

    Attributes:
        bundle: opened.
        threads: how many CPU threads the runtime may use; None leaves the choice to it.
        engine: path of the engine that a backend of engines runs.
        measured: the runner's speed and memory are what is asked for: the runtime loads the graph from its file and
            plans its memory for one batch size. Otherwise the graph's bytes are checked against the manifest, and
            memory is spared where batch sizes change.
    """

    bundle: Bundle
    threads: int | None = None
    engine: str | None = None
    measured: bool = False


@dataclass(frozen=True)
class Backend:
    """One way to run a bundle.

    Attributes:
        name: as given to `--backend` and shown in tables and JSON.
        title: what it runs, one line.
        factory: "module:function" of a function from BackendContext to an inactive Runner.
        modules: top-level modules without which it cannot run.
        requirement: returns why it cannot run on this machine, or None; imports nothing heavy.
        bundle_requirement: returns why it cannot run a bundle, or None.
        environment: additional environment variables of its process, where it has one of its own.
        transfers: what is copied between host and device, and whether the latency has it.
        engine: path of the engine that it runs.
        batch_requirement: returns why it cannot run a batch size, or None.
        default: whether bench measures it where no backend is named. An "always" one that cannot run gets a row that
            says why; one "where it runs" is left out then.
        precision: what it computes in whatever the bundle's graph is in, which then decides the tolerance; None for
            the graph's own.
        verifies: whether `verify` takes it.
        deploys: whether it runs what the bundle deploys, and not the reference module.
    """

    name: str
    title: str
    factory: str
    modules: tuple[str, ...] = ()
    requirement: Callable[[], str | None] | None = None
    bundle_requirement: Callable[[Bundle], str | None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    default: Default = "always"
    transfers: str = NO_TRANSFERS
    engine: str | None = None
    batch_requirement: Callable[[int], str | None] | None = None
    precision: str | None = None
    verifies: bool = False
    deploys: bool = True

    def why_not(self, bundle: Bundle | None = None) -> str | None:
        """Why it cannot run here, or cannot run this bundle, with what to do about it; None where it can be tried."""
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed: pip install {module}"
        reason = self.requirement() if self.requirement is not None else None
        if reason is None and bundle is not None and self.bundle_requirement is not None:
            reason = self.bundle_requirement(bundle)
        return reason

    def why_not_batch(self, batch: int) -> str | None:
        """Why it cannot run a batch size, with what to do about it; None where it can."""
        return self.batch_requirement(batch) if self.batch_requirement is not None else None
