"""Capturing a forward pass in a CUDA graph: one launch for all of its kernels.

Never run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

WARMUPS = 3  # lazily made handles, workspaces and compiled kernels are not allowed to appear inside a capture

T = TypeVar("T")


class CaptureFailedError(RuntimeError):
    """The work cannot be captured; the capture was ended and the work can be run without."""


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A graph, and the tensors its replay fills.

    Attributes:
        graph: replay it on `stream`.
        result: what the captured function returned.
        stream: where it was captured.
    """

    graph: torch.cuda.CUDAGraph
    result: T
    stream: torch.cuda.Stream

    def replay(self) -> T:
        """Run the graph on its stream; returns at once, with tensors that are filled when the stream is done."""
        with torch.cuda.stream(self.stream):
            self.graph.replay()
        return self.result


def capture(function: Callable[[], T], stream: torch.cuda.Stream, *, warmups: int = WARMUPS) -> Captured[T]:
    """Run a function a few times, then capture it.

    Args:
        function: allocates nothing but its results and what it needs on the way, and waits for nothing.
        stream: not the default stream.
        warmups: runs before the capture.

    Raises:
        CaptureFailedError: the warm-up ran, the capture did not.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream(stream.device))
        for _ in range(warmups):
            function()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: what other threads do with the GPU is their business.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CaptureFailedError(f"the CUDA graph could not be captured: {reason}") from error
    return Captured(graph, result, stream)
