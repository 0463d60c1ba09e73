"""The table of backends, and the way from a name to a runner.

A new backend is one entry in `BACKENDS` and a function in `factories`; listing them imports no runtime.

torch-eager and torch-compile run the reference module, the model as its users run it, never this project's operators;
the torch-fused backends run the fused model on a GPU.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from evit_deploy.backends.backend import TRANSFERS_INCLUDED, Backend, BackendContext
from evit_deploy.environment import cpu_isa, find_gpus
from evit_deploy.errors import MissingDependencyError, UsageError, unknown_name_hint
from evit_deploy.runners.base import Runner
from evit_deploy.runners.ort import CUDA, TENSORRT_PROVIDER

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

TENSORRT = "tensorrt"
TORCH_HALF = "torch-half"
_FACTORIES = "evit_deploy.backends.factories"


def _missing_gpu() -> str | None:
    return None if find_gpus() else "there is no NVIDIA GPU with its driver: evit-deploy doctor"


def _missing_bf16() -> str | None:
    if cpu_isa()["bf16"]:
        return None
    return "this CPU has no BF16 (avx512_bf16 or amx_bf16): name backend openvino, which computes in FP32"


def _missing_provider(provider: str) -> str | None:
    """Why an execution provider of ONNX Runtime cannot run; ONNX Runtime is imported only where there is a GPU."""
    reason = _missing_gpu()
    if reason is not None:
        return reason
    import onnxruntime

    if provider in onnxruntime.get_available_providers():
        return None
    return f"this ONNX Runtime has no {provider}: pip install onnxruntime-gpu in the place of onnxruntime"


def _not_fp32(bundle: Bundle) -> str | None:
    precision = bundle.manifest["onnx"].get("precision")
    return None if precision == "fp32" else f"its graph is {precision}, and FP32 is needed"


def _not_half(bundle: Bundle) -> str | None:
    precision = bundle.manifest["onnx"].get("precision")
    return None if precision in ("fp16", "bf16") else f"its graph is {precision}, and FP16 or BF16 is needed"


def _no_engine() -> str | None:
    return _missing_gpu() or "no engine was chosen: engines belong to a bundle"


def _missing_cpp_compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if any(shutil.which(c) for c in candidates):
        return None
    return f"torch.compile needs a C++ compiler and none of {', '.join(candidates)} was found: install g++ or set CXX"


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            "torch-eager", "PyTorch, the reference module", f"{_FACTORIES}:make_torch_eager", ("torch",), deploys=False
        ),
        Backend(
            "torch-compile",
            "PyTorch, the reference module under torch.compile",
            f"{_FACTORIES}:make_torch_compile",
            ("torch",),
            _missing_cpp_compiler,
            deploys=False,
        ),
        Backend(
            "onnxruntime",
            "ONNX Runtime, the bundle's ONNX file",
            f"{_FACTORIES}:make_onnxruntime",
            ("onnxruntime",),
            verifies=True,
        ),
        Backend(
            TORCH_HALF,
            "PyTorch on the CPU, the fused model stored in the graph's half precision: shows overflow, says no speed",
            f"{_FACTORIES}:make_torch_half",
            ("torch",),
            bundle_requirement=_not_half,
            default="never",
            verifies=True,
            deploys=False,
        ),
        Backend(
            "openvino",
            "OpenVINO on the CPU, the bundle's ONNX file in its own precision",
            f"{_FACTORIES}:make_openvino",
            ("openvino",),
            default="where it runs",
            verifies=True,
        ),
        Backend(
            "openvino-bf16",
            "OpenVINO on the CPU, an FP32 bundle's ONNX file computed in BF16",
            f"{_FACTORIES}:make_openvino_bf16",
            ("openvino",),
            _missing_bf16,
            _not_fp32,
            default="never",
            precision="bf16",
            verifies=True,
        ),
        Backend(
            "openvino-mixed",
            "OpenVINO on the CPU, an FP32 bundle's ONNX file in BF16, with FP32 and INT8 weights where these help most",
            f"{_FACTORIES}:make_openvino_mixed",
            ("openvino",),
            _missing_bf16,
            _not_fp32,
            default="never",
            precision="bf16",
            verifies=True,
        ),
        *(
            Backend(
                f"onnxruntime-{name}",
                f"ONNX Runtime on a GPU, its {title} provider",
                f"{_FACTORIES}:make_onnxruntime_{name}",
                ("onnxruntime",),
                partial(_missing_provider, provider),
                environment={"NVIDIA_TF32_OVERRIDE": "0"},
                default="where it runs",
                transfers=TRANSFERS_INCLUDED,
                verifies=True,
            )
            for name, title, provider in (("cuda", "CUDA", CUDA), ("tensorrt", "TensorRT", TENSORRT_PROVIDER))
        ),
        Backend(
            "torch-fused",
            "PyTorch on a GPU, the fused model in a CUDA graph, in the precision of the bundle",
            f"{_FACTORIES}:make_torch_fused",
            ("torch", "triton"),
            _missing_gpu,
            default="where it runs",
            transfers=TRANSFERS_INCLUDED,
        ),
        *(
            Backend(
                f"torch-fused-{precision}",
                f"PyTorch on a GPU, the fused model in a CUDA graph, in {precision.upper()}",
                f"{_FACTORIES}:make_torch_fused_{precision}",
                ("torch", "triton"),
                _missing_gpu,
                default="never",
                transfers=TRANSFERS_INCLUDED,
                precision=precision,
            )
            for precision in ("fp16", "bf16")
        ),
        Backend(
            TENSORRT,
            "TensorRT on a GPU, an engine of the bundle in a CUDA graph",
            f"{_FACTORIES}:make_tensorrt",
            requirement=_no_engine,
            default="where it runs",
            transfers=TRANSFERS_INCLUDED,
        ),
    )
}

VERIFY = tuple(name for name, backend in BACKENDS.items() if backend.verifies)

REFERENCE = Backend("reference", "PyTorch FP32 on the CPU", f"{_FACTORIES}:make_reference", ("torch",))


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        UsageError: unknown; the message has the closest name.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}", hint=unknown_name_hint(name, BACKENDS))
    return BACKENDS[name]


def resolve_backends(
    backends: Sequence[str | Backend] | None, bundle: Bundle | None = None, engine: str | None = None
) -> tuple[Backend, ...]:
    """The backends of a comparison by name; for None those that are measured by default.

    Args:
        backends: names, or backends of the caller's own.
        bundle: what is run; its engines decide whether the backend of engines can run.
        engine: the one that backend shall run, by name or path; measured where no backend is named, too.

    Raises:
        UsageError: a name is unknown or given twice, or there is none; an engine for a comparison without its backend.
        BundleError: the engine is missing, damaged, or of another bundle.
    """
    if backends is None:
        every = (_for_bundle(backend, bundle, engine) for backend in BACKENDS.values())
        return tuple(backend for backend in every if _by_default(backend, bundle, engine))
    found = tuple(backend if isinstance(backend, Backend) else find_backend(backend) for backend in backends)
    if not found:
        raise UsageError("no backend to run", hint=f"known: {', '.join(BACKENDS)}")
    names = [backend.name for backend in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(f"backend {repeated[0]!r} is given twice", hint="name each backend once")
    if engine is not None and TENSORRT not in names:
        raise UsageError(
            f"an engine is given, and no backend runs it: {', '.join(names)}", hint=f"name backend {TENSORRT} as well"
        )
    return tuple(_for_bundle(backend, bundle, engine) for backend in found)


def deployable_backends(bundle: Bundle, engine: str | None = None) -> tuple[Backend, ...]:
    """What could run the exported model here: every backend that can be tried, the reference module's aside.

    Args:
        bundle: what is run.
        engine: one of its engines, whose backend is then among them whether it can be tried or not.
    """
    every = (_for_bundle(backend, bundle, engine) for backend in BACKENDS.values() if backend.deploys)
    named = None if engine is None else TENSORRT
    return tuple(backend for backend in every if backend.name == named or backend.why_not(bundle) is None)


def backend_runner(bundle: Bundle, name: str, *, threads: int | None = None, engine: str | None = None) -> Runner:
    """The inactive runner of a backend for a bundle, its graph's hash checked.

    Args:
        bundle: opened with its hashes checked.
        name: one of BACKENDS.
        threads: CPU threads of the runtime; None leaves the choice to it.
        engine: what backend "tensorrt" runs, by name or path; None stands for the newest that fits this machine.

    Returns:
        The runner; what it lacks on this machine it says on activation.

    Raises:
        UsageError: the name is unknown, the backend does not run this bundle, or an engine is given to another one.
        MissingDependencyError: there is no engine, or none that can be run here.
        BundleError: the engine is missing, damaged, or of another bundle.
    """
    (backend,) = resolve_backends([name], bundle, engine)
    unfit = backend.bundle_requirement(bundle) if backend.bundle_requirement is not None else None
    if unfit is not None:
        raise UsageError(f"{name} does not run this bundle: {unfit}", hint="name another backend")
    if name == TENSORRT and (reason := backend.why_not()) is not None:
        raise MissingDependencyError(f"{name} cannot run: {reason}", hint="evit-deploy doctor")
    return make_runner(backend.factory, BackendContext(bundle, threads, backend.engine))


def make_runner(factory: str, context: BackendContext) -> Runner:
    """The inactive runner that "module:function" makes."""
    module, function = factory.split(":")
    runner: Runner = getattr(importlib.import_module(module), function)(context)
    return runner


def _by_default(backend: Backend, bundle: Bundle | None, engine: str | None) -> bool:
    if backend.default == "where it runs":
        return backend.why_not(bundle) is None or (backend.name == TENSORRT and engine is not None)
    return backend.default == "always"


def _for_bundle(backend: Backend, bundle: Bundle | None, engine: str | None) -> Backend:
    """The backend of engines with the one that it runs; any other backend as it is."""
    if bundle is None or backend is not BACKENDS[TENSORRT]:
        return backend
    from evit_deploy.runners.engines import choose_engine, why_not_batch

    choice = choose_engine(bundle, engine)
    record = choice.record
    return replace(
        backend,
        requirement=lambda: choice.reason,
        engine=None if record is None else str(record.path.absolute()),
        batch_requirement=None if record is None else lambda batch: why_not_batch(record, batch),
    )
