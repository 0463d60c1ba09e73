"""What a verification found, as data, as JSON and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evit_deploy.parity.gate import EXIT_CODES, Tolerance, Verdict, overall

SCHEMA = "evit-deploy/verify"
SCHEMA_VERSION = 1
NOT_VERIFIED = {"verdict": "skipped"}  # what the manifest says where nobody compared


@dataclass(frozen=True)
class VerifyRow:
    """One comparison: one input source at one batch size, in one order, of one output.

    The metrics are those of the worst row and None where they are undefined (NaN in an output, or nothing compared).

    Attributes:
        pair: "reference -> candidate".
        input: name of the input source.
        batch: rows per inference.
        permuted: the rows were fed in another order and their outputs put back.
        output: name of the compared output.
        status: "unverified" where the candidate could not run.
        images: rows compared.
        worst_row: the row that decided, counted from 0 over the images of this comparison.
        worst_label: its file name, or its number.
        max_abs, max_rel, rms_rel, cosine, psnr_db: see `metrics`; psnr_db is None for equal outputs too.
        top1, top5: share of rows that agree.
        nan, inf: elements of the candidate's output over all rows.
        spread: how far the reference's rows are apart, as rms_rel; the tolerance must be smaller to mean anything.
        reason: why it did not pass; empty where it did.
    """

    pair: str
    input: str
    batch: int
    permuted: bool
    output: str
    status: Verdict
    images: int = 0
    worst_row: int | None = None
    worst_label: str | None = None
    max_abs: float | None = None
    max_rel: float | None = None
    rms_rel: float | None = None
    cosine: float | None = None
    psnr_db: float | None = None
    top1: float | None = None
    top5: float | None = None
    nan: int = 0
    inf: int = 0
    spread: float | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "pass"

    @property
    def name(self) -> str:
        order = ", permuted" if self.permuted else ""
        return f"{self.output}, {self.input}, batch {self.batch}{order}"

    def to_json(self) -> dict[str, Any]:
        values = {key: finite_or_none(value) for key, value in vars(self).items()}
        return {**values, "passed": self.passed}


@dataclass(frozen=True)
class VerifyReport:
    """A verification's rows, and everything needed to repeat it.

    Attributes:
        reference, candidate: the runners' names.
        precision: row of the tolerance table.
        executed_precision: what the candidate's runtime says it computes in.
        failures: findings that belong to no single row, for example that nothing was compared.
        notes: what the reader should know although it does not decide.
        subject: what was verified, for example {"bundle": ..., "onnx_sha256": ...}.
        first_bad_block: where a failing model first departs from the reference, where that was looked for.
    """

    reference: str
    candidate: str
    precision: str
    executed_precision: str
    tolerance: Tolerance
    seed: int
    rows: tuple[VerifyRow, ...]
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    subject: Mapping[str, str] = field(default_factory=dict)
    first_bad_block: str | None = None

    @property
    def verdict(self) -> Verdict:
        return "fail" if self.failures else overall(row.status for row in self.rows)

    @property
    def exit_code(self) -> int:
        """0 pass, 3 fail, 4 unverified."""
        return EXIT_CODES[self.verdict]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Every distinct reason, in the order found."""
        texts = [*self.failures, *(row.reason for row in self.rows if row.reason)]
        return tuple(dict.fromkeys(texts))

    def to_json(self) -> dict[str, Any]:
        """Strict JSON data (no NaN, no Infinity) that fits docs/schemas/verify.schema.json."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "subject": dict(self.subject),
            "reference": self.reference,
            "candidate": self.candidate,
            "precision": self.precision,
            "executed_precision": self.executed_precision,
            "tolerance": self.tolerance.to_json(),
            "seed": self.seed,
            "failures": list(self.failures),
            "notes": list(self.notes),
            "first_bad_block": self.first_bad_block,
            "rows": [row.to_json() for row in self.rows],
            "versions": dict(self.versions),
        }

    def manifest_entry(self) -> dict[str, Any]:
        """What the manifest of a verified bundle says of it."""
        worst = max((row.rms_rel for row in self.rows if row.rms_rel is not None), default=None)
        return {"verdict": self.verdict, "worst_rms_rel": worst, "tolerance": self.tolerance.to_json()}

    def summary(self) -> str:
        """The verdict in one line, with the first reason."""
        passed = sum(row.passed for row in self.rows)
        line = f"{self.verdict}: {passed} of {len(self.rows)} comparisons within {self.tolerance}"
        return f"{line}; {self.reasons[0]}" if self.reasons else line

    def table(self) -> str:
        """The rows as a text table, then the tolerance, notes, failures and verdict."""
        header = (
            "batch",
            "input",
            "worst",
            "max_abs",
            "max_rel",
            "rms_rel",
            "cosine",
            "psnr_db",
            "top1",
            "top5",
            "nan",
            "",
        )
        lines: list[tuple[str, ...]] = [header, *(_cells(row) for row in self.rows)]
        if len({row.pair for row in self.rows}) > 1:
            runtimes = ("runtime", *(row.pair.partition(" -> ")[2] for row in self.rows))
            lines = [(runtime, *line) for runtime, line in zip(runtimes, lines, strict=True)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [f"{self.reference} -> {self.candidate}"]
        text += [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        text += [f"note: {note}" for note in self.notes]
        text += [f"failure: {failure}" for failure in self.failures]
        if self.first_bad_block:
            text.append(f"first bad block: {self.first_bad_block}")
        text.append(f"tolerance: {self.tolerance}")
        text.append(f"verdict: {self.verdict}")
        return "\n".join(text)


def merged(first: VerifyReport, second: VerifyReport) -> VerifyReport:
    """One report of two candidates of the same model, compared with the same reference under the same tolerance."""
    executed = dict.fromkeys((first.executed_precision, second.executed_precision))
    return replace(
        first,
        candidate=f"{first.candidate}, {second.candidate}",
        executed_precision=", ".join(executed),
        rows=first.rows + second.rows,
        failures=first.failures + second.failures,
        notes=tuple(dict.fromkeys(first.notes + second.notes)),
    )


def finite_or_none(value: Any) -> Any:
    """None for NaN and infinities, which JSON cannot hold; anything else unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(row: VerifyRow) -> tuple[str, ...]:
    def number(value: float | None, spec: str) -> str:
        return "-" if value is None else format(value, spec)

    psnr = "exact" if row.rms_rel == 0 else number(row.psnr_db, ".1f")
    return (
        f"{row.batch}{' permuted' if row.permuted else ''}",
        row.input,
        "-" if row.worst_label is None else row.worst_label,
        number(row.max_abs, ".1e"),
        number(row.max_rel, ".1e"),
        number(row.rms_rel, ".1e"),
        number(row.cosine, ".6f"),
        psnr,
        number(row.top1, ".1%"),
        number(row.top5, ".1%"),
        str(row.nan),
        f"{row.status}: {row.reason}" if row.reason else row.status,
    )
