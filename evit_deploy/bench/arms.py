"""The backends `bench` knows, and how each is made from a bundle.

A new backend is one entry in `ARMS`: a name, the "module:function" that makes its runner, and what it needs. The
function runs in the arm's own process; this module imports no runtime, so that listing the arms costs nothing.

The arms torch-eager and torch-compile run the reference module, the model as its users run it, never this project's
operators; the torch-fused arms run the fused model on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evit_deploy.environment import find_gpus
from evit_deploy.errors import UsageError, unknown_name_hint
from evit_deploy.runners.base import Runner

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle

Default = Literal["always", "where it runs", "never"]


TENSORRT = "tensorrt"
NO_TRANSFERS = "none (CPU)"
TRANSFERS_INCLUDED = "host to device and back, within the latency"


@dataclass(frozen=True)
class ArmContext:
    """What a factory gets.

    Attributes:
        bundle_path: where the bundle lies.
        threads: how many CPU threads the runtime may use.
        engine: path of the engine that an arm of engines runs.
    """

    bundle_path: Path
    threads: int
    engine: str | None = None


@dataclass(frozen=True)
class Arm:
    """One backend of the comparison.

    Attributes:
        name: as given to `--backend` and shown in tables and JSON.
        title: what it runs, one line.
        factory: "module:function" of a function from ArmContext to an inactive Runner.
        modules: top-level modules without which it cannot run.
        requirement: returns why the arm cannot run on this machine, or None; called in the parent, imports nothing.
        environment: additional environment variables of its process.
        transfers: what is copied between host and device, and whether the latency has it.
        engine: path of the engine that it runs.
        batch_requirement: returns why the arm cannot run a batch size, or None.
        default: whether it is measured where no backend is named. An "always" arm that cannot run gets a row that says
            why; one "where it runs" is left out then.
    """

    name: str
    title: str
    factory: str
    modules: tuple[str, ...] = ()
    requirement: Callable[[], str | None] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    default: Default = "always"
    transfers: str = NO_TRANSFERS
    engine: str | None = None
    batch_requirement: Callable[[int], str | None] | None = None

    def why_not(self) -> str | None:
        """The reason why this arm cannot run here, with what to do about it; None where it can be tried."""
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed: pip install {module}"
        return self.requirement() if self.requirement is not None else None

    def why_not_batch(self, batch: int) -> str | None:
        """The reason why this arm cannot run a batch size, with what to do about it."""
        return self.batch_requirement(batch) if self.batch_requirement is not None else None


def make_torch_eager(context: ArmContext) -> Runner:
    """The reference module in PyTorch, called eagerly."""
    return _torch_runner(context, "eager", "torch-eager")


def make_torch_compile(context: ArmContext) -> Runner:
    """The reference module under torch.compile."""
    return _torch_runner(context, "compile", "torch-compile")


def make_onnxruntime(context: ArmContext) -> Runner:
    """The bundle's ONNX file in ONNX Runtime."""
    from evit_deploy.bundle import Bundle
    from evit_deploy.runners import OnnxRuntimeRunner

    bundle = Bundle.open(context.bundle_path, check_hashes=False)
    return OnnxRuntimeRunner(bundle.onnx_path, threads=context.threads)


def make_torch_fused(context: ArmContext) -> Runner:
    """The fused model on a GPU, in the precision of the bundle's graph."""
    return _fused_runner(context, None)


def make_torch_fused_fp16(context: ArmContext) -> Runner:
    """The fused model on a GPU in FP16."""
    return _fused_runner(context, "fp16")


def make_torch_fused_bf16(context: ArmContext) -> Runner:
    """The fused model on a GPU in BF16."""
    return _fused_runner(context, "bf16")


def make_tensorrt(context: ArmContext) -> Runner:
    """One engine of the bundle in its TensorRT."""
    from evit_deploy.bundle import Bundle
    from evit_deploy.runners.tensorrt import engine_runner
    from evit_deploy.trt.record import open_engine

    assert context.engine is not None
    bundle = Bundle.open(context.bundle_path, check_hashes=False)
    return engine_runner(bundle, open_engine(context.engine, bundle=bundle, check_hash=False))


def make_reference(context: ArmContext) -> Runner:
    """The parity reference: PyTorch FP32 on the CPU."""
    from evit_deploy.bundle import Bundle
    from evit_deploy.runners import reference_runner

    return reference_runner(Bundle.open(context.bundle_path, check_hashes=False))


def _torch_runner(context: ArmContext, mode: Literal["eager", "compile"], name: str) -> Runner:
    from evit_deploy.bundle import Bundle
    from evit_deploy.models import load_model
    from evit_deploy.runners import TorchRunner

    bundle = Bundle.open(context.bundle_path, check_hashes=False)
    module = load_model(bundle.spec, bundle.load_state_dict())
    return TorchRunner(module, threads=context.threads, mode=mode, name=name)


def _fused_runner(context: ArmContext, precision: Literal["fp16", "bf16"] | None) -> Runner:
    from evit_deploy.bundle import Bundle
    from evit_deploy.runners import fused_runner

    bundle = Bundle.open(context.bundle_path, check_hashes=False)
    name = "torch-fused" if precision is None else f"torch-fused-{precision}"
    return fused_runner(bundle, precision=precision, name=name)


def _missing_gpu() -> str | None:
    return None if find_gpus() else "there is no NVIDIA GPU with its driver: evit-deploy doctor"


def _no_engine() -> str | None:
    return _missing_gpu() or "no engine was chosen: engines belong to a bundle"


def _missing_cpp_compiler() -> str | None:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if any(shutil.which(c) for c in candidates):
        return None
    return f"torch.compile needs a C++ compiler and none of {', '.join(candidates)} was found: install g++ or set CXX"


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("torch-eager", "PyTorch, the reference module", f"{__name__}:make_torch_eager", ("torch",)),
        Arm(
            "torch-compile",
            "PyTorch, the reference module under torch.compile",
            f"{__name__}:make_torch_compile",
            ("torch",),
            _missing_cpp_compiler,
        ),
        Arm("onnxruntime", "ONNX Runtime, the bundle's ONNX file", f"{__name__}:make_onnxruntime", ("onnxruntime",)),
        Arm(
            "torch-fused",
            "PyTorch on a GPU, the fused model in a CUDA graph, in the precision of the bundle",
            f"{__name__}:make_torch_fused",
            ("torch", "triton"),
            _missing_gpu,
            default="where it runs",
            transfers=TRANSFERS_INCLUDED,
        ),
        *(
            Arm(
                f"torch-fused-{precision}",
                f"PyTorch on a GPU, the fused model in a CUDA graph, in {precision.upper()}",
                f"{__name__}:make_torch_fused_{precision}",
                ("torch", "triton"),
                _missing_gpu,
                default="never",
                transfers=TRANSFERS_INCLUDED,
            )
            for precision in ("fp16", "bf16")
        ),
        Arm(
            TENSORRT,
            "TensorRT on a GPU, an engine of the bundle in a CUDA graph",
            f"{__name__}:make_tensorrt",
            requirement=_no_engine,
            default="where it runs",
            transfers=TRANSFERS_INCLUDED,
        ),
    )
}

REFERENCE = Arm("reference", "PyTorch FP32 on the CPU", f"{__name__}:make_reference", ("torch",))


def resolve_arms(
    backends: Sequence[str | Arm] | None, bundle: Bundle | None = None, engine: str | None = None
) -> tuple[Arm, ...]:
    """The arms of a comparison by name; for None those that are measured by default.

    Args:
        backends: names, or arms of the caller's own.
        bundle: what is measured; its engines decide whether the arm of engines can run.
        engine: the one that arm shall run, by name or path; measured where no backend is named, too.

    Raises:
        UsageError: a name is unknown or given twice, or there is none; an engine for a comparison without its arm.
        BundleError: the engine is missing, damaged, or of another bundle.
    """
    if backends is None:
        every = (_with_engine(arm, bundle, engine) for arm in ARMS.values())
        return tuple(arm for arm in every if _by_default(arm, engine))
    arms = tuple(backend if isinstance(backend, Arm) else find_arm(backend) for backend in backends)
    if not arms:
        raise UsageError("no backend to measure", hint=f"known: {', '.join(ARMS)}")
    names = [arm.name for arm in arms]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UsageError(f"backend {repeated[0]!r} is given twice", hint="name each backend once")
    if engine is not None and TENSORRT not in names:
        raise UsageError(
            f"an engine is given, and no backend runs it: {', '.join(names)}", hint=f"name backend {TENSORRT} as well"
        )
    return tuple(_with_engine(arm, bundle, engine) for arm in arms)


def _by_default(arm: Arm, engine: str | None) -> bool:
    if arm.default == "where it runs":
        return arm.why_not() is None or (arm.name == TENSORRT and engine is not None)
    return arm.default == "always"


def _with_engine(arm: Arm, bundle: Bundle | None, engine: str | None) -> Arm:
    """The arm of engines with the one that it runs; any other arm as it is."""
    if bundle is None or arm is not ARMS[TENSORRT]:
        return arm
    from evit_deploy.runners.engines import choose_engine, why_not_batch

    choice = choose_engine(bundle, engine)
    record = choice.record
    return replace(
        arm,
        requirement=lambda: choice.reason,
        engine=None if record is None else str(record.path.absolute()),
        batch_requirement=None if record is None else lambda batch: why_not_batch(record, batch),
    )


def find_arm(name: str) -> Arm:
    """The arm of that name.

    Raises:
        UsageError: unknown; the message has the closest name.
    """
    if name not in ARMS:
        raise UsageError(f"unknown backend {name!r}", hint=unknown_name_hint(name, ARMS))
    return ARMS[name]
