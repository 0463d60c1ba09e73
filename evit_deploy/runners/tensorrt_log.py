"""TensorRT's messages: to Python's logging, and the last error kept, for an exception that would say nothing else."""

from __future__ import annotations

import logging
import re
from typing import Any

MAX_MESSAGE_CHARS = 300
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|allocate memory", re.IGNORECASE)


class TensorRtLog:
    """A logger for TensorRT.

    Args:
        trt: the bindings.
        log: where its errors, warnings and other messages go, as debug messages: who calls TensorRT says what failed.

    Attributes:
        logger: to be given to TensorRT; lives as long as what it was given to.
        out_of_memory: some error was about memory.
    """

    def __init__(self, trt: Any, log: logging.Logger) -> None:
        self.out_of_memory = False
        self._last = ""
        self._log = log
        severity = trt.ILogger.Severity
        self._errors = (severity.ERROR, severity.INTERNAL_ERROR)
        self.logger = _make_logger(trt, self._take)

    def take_last(self) -> str:
        """The last error, "" when there was none since the last call."""
        last, self._last = self._last, ""
        return last

    def _take(self, severity: Any, message: str) -> None:
        text = " ".join(message.split())[:MAX_MESSAGE_CHARS]
        if severity in self._errors:
            self._last = text
            self.out_of_memory = self.out_of_memory or bool(_OUT_OF_MEMORY.search(text))
        self._log.debug("TensorRT: %s", text)


def _make_logger(trt: Any, take: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            take(severity, msg)

    return Logger()
