"""Whether anybody measured that an FP16 bundle's values fit: TensorRT builds what overflows without a word."""

from __future__ import annotations

from typing import Any

from evit_deploy.bundle import Bundle
from evit_deploy.errors import InputDataError
from evit_deploy.headroom.digest import weights_digest
from evit_deploy.headroom.storage import load_report


def range_doubt(bundle: Bundle) -> str:
    """Why an FP16 bundle may overflow, or "" where its headroom was measured and suffices, or its graph is not FP16.

    What the export recorded counts, and so does a report that was measured on the bundle later.
    """
    facts = bundle.manifest["onnx"]
    if facts["precision"] != "fp16":
        return ""
    summary = bundle.manifest.get("headroom") or _own_report(bundle)
    if summary is None:
        return "its headroom was never measured, values may overflow: evit-deploy headroom BUNDLE --images FOLDER"
    missing = [block for block in summary["keep_fp32"] if block not in facts.get("keep_fp32", ())]
    if missing:
        return f"its headroom report asks for FP32 in {', '.join(missing)}: export with --keep-fp32 auto"
    return ""


def _own_report(bundle: Bundle) -> dict[str, Any] | None:
    try:
        report = load_report(bundle)
    except InputDataError:
        return None
    return report.summary() if report.matches(bundle.spec, weights_digest(bundle.load_state_dict())) else None
