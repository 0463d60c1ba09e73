"""The parity gate: a candidate against PyTorch FP32, row by row."""

from __future__ import annotations

from evit_deploy.images.sources import InputSource, RandomInputs, open_inputs
from evit_deploy.parity.gate import TOLERANCES, Tolerance, Verdict, tolerance_for
from evit_deploy.parity.junit import junit_xml, write_junit
from evit_deploy.parity.report import VerifyReport, VerifyRow
from evit_deploy.parity.verify import default_batches, verify_runner

__all__ = [
    "TOLERANCES",
    "InputSource",
    "RandomInputs",
    "Tolerance",
    "Verdict",
    "VerifyReport",
    "VerifyRow",
    "default_batches",
    "junit_xml",
    "open_inputs",
    "tolerance_for",
    "verify_runner",
    "write_junit",
]
