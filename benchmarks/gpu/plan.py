"""Which cases there are, and which matter most: a run that is cut short has those."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu import kernels, models, ptx
from benchmarks.gpu.budget import Task
from benchmarks.gpu.kernels import Bench
from benchmarks.gpu.model_arms import MODES
from benchmarks.gpu.settings import KEY_MODELS
from benchmarks.gpu.sizes import Size, sizes_of

BATCHES = (1, 64, 256)
MODEL_BATCHES = (1, 8, 64, 256)
MAIN_BATCH = 64
SMOKE_BATCH = 2
ALL_MODES = tuple(MODES)


def plan(bench: Bench, model_names: Sequence[str] = KEY_MODELS) -> list[Task]:
    """Every task, the most important first."""
    if not bench.device.is_gpu:
        return _smoke_plan(bench, model_names)
    sizes = sizes_of(model_names)
    first = list({size.operator: size for size in reversed(sizes)}.values())
    others = [size for size in sizes if size not in first]
    key = [
        *kernels.tasks(bench, _cases(first, (MAIN_BATCH,), ("fp16",))),
        *ptx.tasks(bench, sizes, (MAIN_BATCH,)),
        *models.tasks(bench, _key_model_cases(model_names)),
    ]
    more = [
        *kernels.tasks(bench, _cases(others, (MAIN_BATCH,), ("fp16",))),
        *kernels.tasks(bench, _cases(first, (1, 256), ("fp16",))),
        *kernels.tasks(bench, _cases(first, (MAIN_BATCH,), ("bf16", "fp32"))),
        *ptx.tasks(bench, sizes, (1,)),
        *kernels.tasks(bench, _cases(others, (1, 256), ("fp16",))),
        *kernels.tasks(bench, _cases(sizes, BATCHES, ("bf16",))),
        *models.tasks(bench, _other_model_cases(model_names)),
    ]
    return list({(task.benchmark, task.label): task for task in [*key, *more]}.values())


def _smoke_plan(bench: Bench, model_names: Sequence[str]) -> list[Task]:
    sizes = sizes_of(model_names, smoke=True)
    first = list({size.operator: size for size in reversed(sizes)}.values())
    cases = [models.Case(name, SMOKE_BATCH, "fp32", ()) for name in model_names]
    return [
        *kernels.tasks(bench, _cases(first, (SMOKE_BATCH,), ("fp32", "fp16"))),
        *ptx.tasks(bench, sizes, (SMOKE_BATCH,)),
        *models.tasks(bench, cases),
    ]


def _cases(sizes: Sequence[Size], batches: Sequence[int], precisions: Sequence[str]) -> list[kernels.Case]:
    return [kernels.Case(size, batch, p) for batch in batches for p in precisions for size in sizes]


def _key_model_cases(names: Sequence[str]) -> list[models.Case]:
    large = [models.Case(name, MAIN_BATCH, "fp16", ("compile-max-autotune-no-graph",)) for name in names]
    small = [models.Case(name, 1, "fp16", ("compile-reduce-overhead",)) for name in names]
    return [case for pair in zip(large, reversed(small), strict=True) for case in pair]


def _other_model_cases(names: Sequence[str]) -> list[models.Case]:
    return [
        models.Case(name, batch, precision, ALL_MODES)
        for precision in ("fp16", "bf16")
        for batch in MODEL_BATCHES
        for name in names
    ]
