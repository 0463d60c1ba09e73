"""`python -m tests.plugin_builder`: graphs through the real parser and builder of TensorRT for RTX, as JSON.

A process of its own, because the parser opens TensorRT's library under a name that only LD_LIBRARY_PATH can give it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx

from tests.conftest import process_environment
from tests.plugin_graphs import CASES, DTYPES, OP_TYPES, TYPICAL, plugin_graph

BATCHES = (1, 4, 9)  # of the profile: min, opt, max
ARCHES = (89, 120)

# Name to op_type and what is wrong with its node; the batch of the profile's maximum where that is.
FAULTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "missing": ("EvitLiteMLA", {"eps": None}, 9),
    "kind": ("EvitMultiScaleAttention", {"heads": 2.5}, 9),
    "contradiction": ("EvitMultiScaleAttention", {"height": 9}, 9),
    "heads": ("EvitMultiScaleAttention", {"heads": 3}, 9),
    "batch": ("EvitMultiScaleAttention", {}, 2**29),
}


def build_in_child(folder: Path) -> dict[str, dict[str, Any]]:
    """What became of each graph.

    Args:
        folder: for the library's other name.
    """
    spec = find_spec("tensorrt_rtx_libs")
    assert spec is not None
    assert spec.origin is not None
    (folder / "libtensorrt_rtx.so").symlink_to(Path(spec.origin).parent / "libtensorrt_rtx.so.1")
    path = os.pathsep.join([str(folder), os.environ.get("LD_LIBRARY_PATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "tests.plugin_builder"],
        env=process_environment({"LD_LIBRARY_PATH": path, "EVIT_DEPLOY_KERNEL_CACHE": str(folder / "kernels")}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


def build(trt: Any, model: onnx.ModelProto, op_type: str, max_batch: int = BATCHES[-1]) -> dict[str, Any]:
    """Parse and build, as far as it goes."""
    from evit_deploy.trt.plugin import take_plugin_errors

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    take_plugin_errors()
    result: dict[str, Any] = {"parsed": parser.parse(model.SerializeToString()), "built": False}
    result["nodes"] = [parser.get_error(i).node_name() for i in range(parser.num_errors)]
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    result["plugins"] = [layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3]
    result["layers"] = len(layers)
    if result["parsed"]:
        result["output"] = list(network.get_output(0).shape)
        config = builder.create_builder_config()
        config.num_compute_capabilities = len(ARCHES)
        for i, arch in enumerate(ARCHES):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{arch}"), i)
        if result["output"][0] == -1:
            profile = builder.create_optimization_profile()
            for name, shape in CASES[op_type].maps.items():
                profile.set_shape(name, *((batch, *shape) for batch in (*BATCHES[:2], max_batch)))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        result["built"] = plan is not None
        if plan is not None:
            data = bytes(plan)
            result["size_bytes"] = len(data)
            result["holds"] = [name for name in ("kernel_hash", "input_shapes") if name.encode() in data]
    result["errors"] = [str(error) for error in take_plugin_errors()]
    return result


def results() -> Iterator[tuple[str, dict[str, Any]]]:
    from evit_deploy.trt import plugin
    from evit_deploy.trt.flavors import load_flavor

    flavor = load_flavor("rtx")
    for op_type in TYPICAL:
        yield f"body-{op_type}", build(flavor.trt, plugin_graph(op_type), op_type)
    missing = plugin.missing_plugins(flavor, OP_TYPES)
    names = [plugin.register_plugins(flavor, OP_TYPES, form="jit", arches=ARCHES) for _ in range(2)]
    creators = [creator.name for creator in flavor.trt.get_plugin_registry().all_creators]
    yield "registry", {"missing": missing, "names": names, "counts": [creators.count(name) for name in OP_TYPES]}
    for op_type in OP_TYPES:
        for dtype in DTYPES:
            yield f"{op_type}-{dtype}", build(flavor.trt, plugin_graph(op_type, dtype), op_type)
    yield "fixed-batch", build(flavor.trt, plugin_graph(TYPICAL[0], batch=4), TYPICAL[0])
    yield "not-asking", build(flavor.trt, plugin_graph(TYPICAL[0], asking=False), TYPICAL[0])
    for name, (op_type, attributes, max_batch) in FAULTS.items():
        graph = plugin_graph(op_type, attributes=attributes)
        yield f"fault-{name}", build(flavor.trt, graph, op_type, max_batch)
    for op_type in TYPICAL:
        for dtype in DTYPES:
            yield f"ptx-{op_type}-{dtype}", compiled(plugin_graph(op_type, dtype))


def compiled(model: onnx.ModelProto) -> dict[str, Any]:
    """The kernel of a graph's one layer for the first architecture."""
    from evit_kernels.ptx import entry_parameters

    from evit_deploy.trt.operators import plugin_layers
    from evit_deploy.trt.plugin_kernels import compile_for

    layers = plugin_layers(model.SerializeToString())
    (kernel,) = compile_for(layers, ARCHES[:1], lambda line: None).values()
    _, parameters = entry_parameters(kernel.ptx)
    bits = ["".join(filter(str.isdigit, parameter.split()[1])) for parameter in parameters]
    return {"bits": bits, "target": kernel.target}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dict(results())))
