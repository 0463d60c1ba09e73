"""The result of one benchmark: rows with goals, the conditions they were measured under, and the JSON they become."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from evit_deploy.environment import collect_environment
from evit_deploy.errors import EvitDeployError

SCHEMA = "evit-deploy/benchmark"
SCHEMA_VERSION = 1
RESULTS = Path(__file__).resolve().parent / "results"

RATIO = "x"
SECONDS = "s"
BYTES = "bytes"
COUNT = "count"
PERCENT = "%"
POINTS = "points"
ERROR = "rms_rel"

_SIGNIFICANT_DIGITS = 5
_RELATIONS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Goal:
    """What a value must be to its limit: ">=", "<" or "<="."""

    relation: str
    limit: float

    def met(self, value: float) -> bool:
        return _RELATIONS[self.relation](value, self.limit)

    def to_json(self) -> dict[str, Any]:
        return {"relation": self.relation, "limit": self.limit}


@dataclass(frozen=True)
class Row:
    """One measured value.

    Attributes:
        subject: what was measured, for example a model.
        quantity: of what the value is, for example "speedup".
        unit: RATIO, SECONDS, BYTES, COUNT, PERCENT, POINTS or ERROR.
        value: None where it could not be measured or must not be stated.
        ci_low, ci_high: 95 % interval, None where there is none.
        goal: None where nothing is promised.
        reason: why the value is missing or does not count, "" where it counts.
        unstable: the value does not count by itself because rounds spread; its interval, which has that in it, does.
        details: everything else that was seen, JSON-able.
    """

    subject: str
    quantity: str
    unit: str
    value: float | None
    batch: int | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    goal: Goal | None = None
    reason: str = ""
    unstable: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        """Whether the value meets the goal, of an unstable one both ends of its interval; None without a goal."""
        if self.goal is None:
            return None
        judged = (self.ci_low, self.ci_high) if self.unstable else (self.value,)
        counts = self.unstable or not self.reason
        return counts and all(value is not None and self.goal.met(value) for value in judged)

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "quantity": self.quantity,
            "batch": self.batch,
            "unit": self.unit,
            "value": self.value,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "goal": self.goal.to_json() if self.goal else None,
            "reached": self.reached,
            "reason": self.reason or None,
            "details": dict(self.details),
        }


@dataclass(frozen=True)
class Result:
    """One benchmark.

    Attributes:
        benchmark: its name, also that of its file.
        title: what it compares, one line.
        goal: what is promised, in words.
        command: what repeats it.
        protocol: every setting of the measurement.
    """

    benchmark: str
    title: str
    goal: str
    command: str
    protocol: Mapping[str, Any]
    rows: Sequence[Row]

    @property
    def reached(self) -> bool:
        """Every goal is; without any goal, none is."""
        verdicts = [row.reached for row in self.rows if row.reached is not None]
        return bool(verdicts) and all(verdicts)

    def to_json(self) -> dict[str, Any]:
        """The document of result.schema.json, with this machine and its versions."""
        document = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "benchmark": self.benchmark,
            "title": self.title,
            "goal": self.goal,
            "reached": self.reached,
            "command": self.command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "protocol": dict(self.protocol),
            "rows": [row.to_json() for row in self.rows],
        }
        rounded: dict[str, Any] = _rounded(document)
        return rounded


def machine() -> dict[str, Any]:
    """The CPU and the memory; no names and no paths."""
    environment = collect_environment()
    cpu = environment["cpu"]
    return {
        "architecture": environment["machine"],
        "cpu": cpu["model"],
        "logical_cores": cpu["logical_cores"],
        "usable_cores": cpu["usable_cores"],
        "isa": sorted(name for name, present in cpu["isa"].items() if present),
        "memory_bytes": environment["memory_bytes"],
    }


def versions() -> dict[str, str]:
    """Of this tool, Python and the packages that are installed."""
    environment = collect_environment()
    packages = {name: version for name, version in environment["versions"].items() if version is not None}
    return {"evit_deploy": environment["evit_deploy"], "python": environment["python"], **packages}


def write_result(document: Mapping[str, Any], folder: Path) -> Path:
    """Write NAME.json, all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{document['benchmark']}.json"
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(staged, path)
    return path


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result of a folder by its name.

    Raises:
        EvitDeployError: a file there is no result of this schema version.
    """
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise EvitDeployError(f"{path} is no JSON", hint="run its benchmark again") from error
        found = (document.get("schema"), document.get("schema_version")) if isinstance(document, dict) else None
        if found != (SCHEMA, SCHEMA_VERSION):
            raise EvitDeployError(
                f"{path} is no {SCHEMA} document of version {SCHEMA_VERSION}, got {found}",
                hint="run its benchmark again, or remove the file",
            )
        results[document["benchmark"]] = document
    return results


def _rounded(value: Any) -> Any:
    """Every float to a few significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
