"""The results as one Markdown table, which README and docs quote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.result import BYTES, COUNT, ERROR, PERCENT, POINTS, RATIO, SECONDS

COLUMNS = ("what", "model", "batch", "measured", "95 % interval", "p50 before -> after", "goal", "reached")
_TITLES = {True: "yes", False: "**no**", None: "-"}


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A row per measured value in the order of the results, then what it was measured on."""
    lines = [_line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(_cells(row)) for result in results for row in result["rows"]]
    conditions = dict.fromkeys(_conditions(result) for result in results)
    return "\n".join([*lines, "", *conditions])


def _cells(row: Mapping[str, Any]) -> list[str]:
    unit, goal = row["unit"], row["goal"]
    measured = "-" if row["value"] is None else quantity(row["value"], unit)
    if row["reason"]:
        measured += f" ({row['reason']})"
    interval = "-" if row["ci_low"] is None else f"{row['ci_low']:.2f} to {row['ci_high']:.2f}"
    return [
        row["quantity"],
        row["subject"],
        "-" if row["batch"] is None else str(row["batch"]),
        measured,
        interval,
        _latencies(row["details"]),
        "-" if goal is None else f"{goal['relation']} {quantity(goal['limit'], unit)}",
        _TITLES[row["reached"]],
    ]


def quantity(value: float, unit: str) -> str:
    """A value with its unit, as people read it."""
    if unit == RATIO:
        return f"{value:.2f}x"
    if unit == SECONDS:
        if value < 1e-4:
            return f"{value * 1e6:.2g} us"
        return f"{value:.0f} s" if value >= 10 else f"{value:.2g} s"
    if unit == BYTES:
        return f"{value / 1024**3:.1f} GiB" if value >= 1024**3 else f"{value / 1024**2:.0f} MiB"
    if unit == COUNT:
        return f"{value:.0f}"
    if unit == PERCENT:
        return f"{value:.2f} %"
    if unit == POINTS:
        return f"{value:.2f} points"
    if unit == ERROR:
        return f"{value:.1e}"
    raise ValueError(f"no such unit, got {unit=}")


def _latencies(details: Mapping[str, Any]) -> str:
    values = [details.get(arm, {}).get("p50_ms") for arm in ("baseline", "ours")]
    if None in values:
        return "-"
    before, after = (f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in values)
    return f"{before} -> {after} ms"


def _conditions(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm", "onnxruntime") if name in versions)
    memory = f"{machine['memory_bytes'] / 1024**3:.0f} GiB" if machine["memory_bytes"] else "unknown memory"
    quick = " Measured with --quick: the figures mean nothing." if result["protocol"].get("quick") else ""
    return (
        f"{machine['cpu']}, {machine['usable_cores']} cores, {memory}; Python {versions['python']}, {packages}; "
        f"{result['date'][:10]}.{quick}"
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
