"""From a bundle to an engine in it: `evit_deploy.trt` builds, `evit_deploy.onnx` gives the graph the form it needs."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from evit_deploy.bundle import Bundle
from evit_deploy.errors import InputDataError
from evit_deploy.onnx.functions import replace_functions
from evit_deploy.trt.build import BuildOptions, BuildResult, build_engine


def build_bundle_engine(
    bundle: Bundle, options: BuildOptions, progress: Callable[[str], None] | None = None
) -> BuildResult:
    """Build an engine into a bundle, or find it there; arguments, result and errors are those of `build_engine`."""
    return build_engine(bundle, options, progress, scaled_graph=scaled_graph)


def scaled_graph(bundle: Bundle) -> bytes:
    """The bundle's ONNX file with the attention's matrix products in the nodes' own type, scaled to stay in its range.

    Raises:
        BundleError: the file has another hash than the manifest says.
        InputDataError: it is no ONNX model.
    """
    try:
        model = onnx.load_model_from_string(bundle.read_onnx())
    except DecodeError as error:
        raise InputDataError(f"{bundle.onnx_path} is not an ONNX model: {error}") from error
    graph: bytes = replace_functions(model, "scaled").SerializeToString()
    return graph
