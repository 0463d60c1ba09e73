"""A remedy for Triton's interpreter, which keeps BF16 as 16-bit patterns and multiplies those in `tl.dot`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def widen_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's `tl.dot` see BF16 operands as the FP32 numbers they stand for, as a GPU does."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        patterns = np.ascontiguousarray(operand.data).view(np.uint16).astype(np.uint32)
        return interpreter.TensorHandle((patterns << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
