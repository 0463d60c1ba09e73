"""`python -m tests.trtsim.contract VERSION FORM FOLDER`: graphs through our code and the bindings, over the simulation.

FOLDER has whole models' graphs, NAME.onnx, and gets what came out, FORM-VERSION.json: the bindings themselves write to
stdout. A process of its own for each version and form, because a registry belongs to a process.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.conftest import process_environment
from tests.plugin_graphs import DTYPES, OP_TYPES, plugin_graph
from tests.trtsim.setup import bindings_folder

ARCH = 90
PROFILE = (1, 3, 8)
TWO_PROFILES = ((1, 1, 1), (2, 6, 64))
WORKSPACE_BYTES = 123 << 20
OPTIMIZATION_LEVEL = 2
STREAM = 0xABC
FIRST_ADDRESS = 0x1000


def run_in_child(version: str, form: str, folder: Path, cache: Path) -> dict[str, Any]:
    """What came out, name to result.

    Args:
        version: of the bindings.
        form: "aot" or "jit".
        folder: with whole models' graphs.
        cache: of compiled kernels.
    """
    bindings = str(bindings_folder(version))
    environment = process_environment({"EVIT_DEPLOY_KERNEL_CACHE": str(cache)})
    environment["PYTHONPATH"] = os.pathsep.join([bindings, environment["PYTHONPATH"]])
    command = [sys.executable, "-m", "tests.trtsim.contract", version, form, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((folder / f"{form}-{version}.json").read_text(encoding="utf-8"))
    return results


class Session:
    """One process: a simulation, and our adapter of the bindings over it."""

    def __init__(self, version: str, form: str, folder: Path) -> None:
        from tests.trtsim import core

        self.simulation = core.start(version)
        from evit_deploy.trt.flavors import load_flavor

        self.form, self.folder = form, folder
        self.flavor = load_flavor("tensorrt")

    def build(self, onnx_bytes: bytes, **changes: Any) -> dict[str, Any]:
        """Build with our builder, as far as it goes; `changes` are of the request."""
        from evit_deploy.trt.builder import build
        from evit_deploy.trt.operators import plugin_layers
        from evit_deploy.trt.plugin import take_plugin_errors
        from evit_deploy.trt.request import BuildRequest
        from tests.trtsim.builder import read_plan

        events: list[Any] = []
        self._forget()
        take_plugin_errors()
        result: dict[str, Any] = {"error": None}
        plan_path = self.folder / f"{self.form}.plan"
        plan_path.unlink(missing_ok=True)
        try:
            layers = [] if changes.get("plugin_form", self.form) is None else plugin_layers(onnx_bytes)
            digest = hashlib.sha256(onnx_bytes).hexdigest()
            onnx_path = self.folder / f"{digest}.graph"
            onnx_path.write_bytes(onnx_bytes)
            request = BuildRequest(
                flavor="tensorrt",
                onnx_path=str(onnx_path),
                onnx_sha256=digest,
                plan_path=str(plan_path),
                profiles=(PROFILE,),
                plugin_form=self.form,
                op_types=tuple(dict.fromkeys(layer.op_type for layer in layers)),
                arches=(ARCH,),
                expected_plugins=len(layers),
                has_gpu=True,
            )
            result["answer"] = build(self.flavor, replace(request, **changes), events.append)
            result["plan"] = read_plan(plan_path.read_bytes())
        except Exception as error:  # noqa: BLE001 - which one it is, is what the tests look at
            details = [str(detail) for detail in getattr(error, "details", ())]
            result |= {"error": type(error).__name__, "message": str(error), "details": details}
            result["traceback"] = traceback.format_exc()
        result |= self._observed()
        result["plugin_errors"] = [str(error) for error in take_plugin_errors()]
        result["events"] = events
        return result

    def run(self, onnx_bytes: bytes, batches: tuple[int, ...]) -> dict[str, Any]:
        """Build, then run with the bindings alone: what the plugins launch for each batch."""
        built = self.build(onnx_bytes)
        if built["error"] is not None:
            return built
        trt = self.flavor.trt
        launcher = RecordingLauncher()
        if self.form == "jit":
            from evit_deploy.trt.plugin import register_plugins

            register_plugins(self.flavor, OP_TYPES, form="jit", arches=(ARCH,), launcher=launcher)
        self._forget()
        plan = (self.folder / f"{self.form}.plan").read_bytes()
        engine = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(plan)
        if engine is None:
            return {"error": "not deserialized", **self._observed()}
        context = engine.create_execution_context()
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        addresses = {name: FIRST_ADDRESS * (i + 1) for i, name in enumerate(names)}
        ran = []
        for batch in batches:
            for name in names:
                if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                    context.set_input_shape(name, (batch, *tuple(engine.get_tensor_shape(name))[1:]))
                context.set_tensor_address(name, addresses[name])
            ran.append(context.execute_async_v3(STREAM))
        result = {"ran": ran, "addresses": addresses, "launches": launcher.launches, "loads": launcher.loads}
        result["without_creator"] = self._without_creators(plan)
        return {"error": None, **result, **self._observed()}

    def _without_creators(self, plan: bytes) -> bool:
        """Whether the plan is taken where no plugin is registered."""
        trt, creators = self.flavor.trt, list(self.simulation.creators)
        self.simulation.creators.clear()
        try:
            return trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(plan) is not None
        finally:
            self.simulation.creators.extend(creators)

    def _forget(self) -> None:
        for noted in (self.simulation.calls, self.simulation.unknown, self.simulation.faults):
            noted.clear()

    def _observed(self) -> dict[str, Any]:
        from tests.trtsim.parser import Parser

        last = [thing for thing in self.simulation.objects.values() if isinstance(thing, Parser)][-1]
        return {
            "choices": list(last.choices),
            "warnings": list(last.warnings),
            "config": [
                (method, [value for value in arguments if isinstance(value, int)])
                for method, arguments in self.simulation.steps("BuilderConfig")
            ],
            "unknown": list(self.simulation.unknown),
            "faults": list(self.simulation.faults),
        }


class RecordingLauncher:
    """Stands in for the one over PyCUDA."""

    arch = ARCH

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.launches: list[tuple[Any, ...]] = []

    def load(self, kernel: Any) -> str:
        self.loads.append(kernel.entry)
        return str(kernel.entry)

    def launch(self, handle: str, grid: int, arguments: Any, stream: int) -> None:
        self.launches.append((handle, grid, [int(argument) for argument in arguments], int(stream)))


def results(session: Session) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name, and what makes the result; in this order, because the first ones must find nothing registered."""
    graphs = {f"{op_type}-{dtype}": plugin_graph(op_type, dtype) for op_type in OP_TYPES for dtype in DTYPES}
    typical = graphs["EvitMultiScaleAttention-fp16"].SerializeToString()
    models = {path.stem: path.read_bytes() for path in sorted(session.folder.glob("*.onnx"))}
    for op_type in OP_TYPES:
        graph = graphs[f"{op_type}-fp32"].SerializeToString()
        yield f"function-{op_type}", lambda graph=graph: session.build(graph, plugin_form=None)
    for name, model in models.items():
        yield f"function-{name}", lambda model=model: session.build(model, plugin_form=None)
    yield "unregistered", lambda: session.build(typical, op_types=())
    for name, graph in graphs.items():
        yield name, lambda graph=graph: session.build(graph.SerializeToString())
    for name, model in models.items():
        yield name, lambda model=model: session.build(model, profiles=TWO_PROFILES)
    yield "not-asking", lambda: session.build(_not_asking())
    cache = str(session.folder / f"{session.form}.timing")
    options = {
        "workspace_bytes": WORKSPACE_BYTES,
        "optimization_level": OPTIMIZATION_LEVEL,
        "timing_cache_path": cache,
        "version_compatible": True,
        "hardware_compatible": True,
        "refit": True,
        "strip_weights": True,
        "trt_progress": True,
    }
    yield "options", lambda: session.build(typical, **options)
    yield "timing-cache", lambda: Path(cache).read_bytes().decode("latin1")
    yield "options-again", lambda: session.build(typical, **options)
    yield "timing-cache-again", lambda: Path(cache).read_bytes().decode("latin1")
    yield "flags", lambda: _flag_numbers(session.flavor.trt)
    yield "bad-profile", lambda: session.build(typical, profiles=((4, 2, 1),))
    yield "fixed-batch", lambda: session.build(plugin_graph(OP_TYPES[0], batch=4).SerializeToString())
    yield "unknown-operator", lambda: session.build(_unknown_operator())
    yield "missing-attribute", lambda: session.build(_missing_attribute(), op_types=OP_TYPES, expected_plugins=1)
    yield "unknown-arch", lambda: session.build(typical, arches=(75,))
    yield "no-model", lambda: session.build(typical[:40], plugin_form=None)
    for op_type in OP_TYPES:
        yield (
            f"run-{op_type}",
            lambda op_type=op_type: session.run(graphs[f"{op_type}-fp16"].SerializeToString(), (1, 8, 3)),
        )


def _not_asking() -> bytes:
    graph: bytes = plugin_graph("EvitLiteMLA", asking=False).SerializeToString()
    return graph


def _missing_attribute() -> bytes:
    graph: bytes = plugin_graph("EvitLiteMLA", attributes={"eps": None}).SerializeToString()
    return graph


def _unknown_operator() -> bytes:
    model = plugin_graph("EvitLiteMLA")
    model.graph.node[0].op_type, model.graph.node[0].name = "EvitNothing", "the_culprit"
    graph: bytes = model.SerializeToString()
    return graph


def _flag_numbers(trt: Any) -> dict[str, dict[str, int]]:
    """Names to numbers of the enumerations, as this version has them."""
    enumerations = ("BuilderFlag", "NetworkDefinitionCreationFlag", "MemoryPoolType", "ProfilingVerbosity")
    enumerations += ("HardwareCompatibilityLevel",)
    return {
        name: {member: int(value) for member, value in getattr(trt, name).__members__.items()} for name in enumerations
    }


def main() -> None:
    version, form, folder = sys.argv[1:]
    session = Session(version, form, Path(folder))
    found = {name: make() for name, make in results(session)}
    found["version"] = session.flavor.version
    Path(folder, f"{form}-{version}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
