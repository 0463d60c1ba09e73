"""Faults of engines, plugins and compiled kernels, of what work is counted, and of benchmarks' goals and figures."""

from __future__ import annotations

from tests.mutants.table import faults

_TRT = "evit_deploy/trt"
_KERNELS = "kernels/evit_kernels"

ENGINE_FAULTS = (
    *faults(
        "engine",
        f"{_TRT}/record.py",
        "tests/test_trt_record.py",
        {
            "its hash not compared": (
                "if check_hash and (digest := hash_stream(file)) != record.engine_sha256:",
                "if check_hash and not (digest := hash_stream(file)):",
            ),
        },
    ),
    *faults(
        "build",
        f"{_TRT}/plan.py",
        "tests/test_trt_plan.py",
        {
            "falls back where the plugin is required": (
                "        if self.options.require_plugin:\n",
                "        if self.options.require_plugin and not reason:\n",
            ),
        },
    ),
    *faults(
        "build",
        f"{_TRT}/profiles.py",
        "tests/test_trt_plan.py",
        {
            "a batch above the largest": ("profile.max > largest:", "profile.opt > largest:"),
        },
    ),
    *faults(
        "build",
        f"{_TRT}/staging.py",
        "tests/test_trt_staging.py",
        {
            "lock not taken": ("            self._lock.acquire()\n", "            self._lock.path.touch()\n"),
        },
    ),
    *faults(
        "plugin",
        f"{_TRT}/plugin_v3.py",
        "tests/test_trt_plugin_v3.py",
        {
            "kernels of another version": ("        if found != expected:\n", "        if not found:\n"),
        },
    ),
    *faults(
        "plugin",
        f"{_TRT}/description.py",
        "tests/test_trt_operators.py",
        {
            "attributes that contradict the inputs": (
                "            if attributes[name] != size:\n",
                "            if attributes[name] < 1:\n",
            ),
        },
    ),
    *faults(
        "plugin",
        f"{_TRT}/description.py",
        "tests/test_trt_plugin_v3.py",
        {"a grid beyond CUDA's": ("if not 0 < batch * programs <= MAX_GRID:", "if not 0 < batch <= MAX_GRID:")},
    ),
    *faults(
        "kernel key",
        f"{_KERNELS}/aot.py",
        "tests/test_kernel_cache.py",
        {
            "without the constants' values": ("sorted(launch.constants.items())", "sorted(launch.constants)"),
        },
    ),
    *faults(
        "kernel limits",
        f"{_KERNELS}/aot.py",
        "tests/test_aot.py",
        {
            "more shared memory than a plugin has": (
                "if self.shared_bytes > MAX_SHARED_BYTES:",
                "if self.shared_bytes > 4 * MAX_SHARED_BYTES:",
            ),
        },
    ),
    *faults(
        "kernel cache",
        f"{_KERNELS}/cache.py",
        "tests/test_kernel_cache.py",
        {
            "a kernel of another Triton is good": (
                "if kernel is None or installed_triton() not in (None, kernel.triton_version):",
                "if kernel is None:",
            ),
        },
    ),
    *faults(
        "kernel cache",
        f"{_KERNELS}/entry.py",
        "tests/test_kernel_cache.py",
        {
            "an entry's hash not compared": (
                'if document.get("ptx_sha256") != _sha256(kernel.ptx):',
                'if not document.get("ptx_sha256"):',
            ),
        },
    ),
    *faults(
        "kernel pack",
        f"{_KERNELS}/pack.py",
        "tests/test_kernel_pack.py",
        {
            "a member of any size": ("data = file.read(limit_bytes + 1)", "data = file.read(limit_bytes)"),
        },
    ),
    *faults(
        "ptx",
        f"{_KERNELS}/ptx.py",
        "tests/test_ptx.py",
        {
            "scratch memory that is used cut off": (
                'rf"\\b{re.escape(variable)}\\b", ptx)) > 1:',
                'rf"\\b{re.escape(variable)}\\b", ptx)) > 99:',
            ),
        },
    ),
    *faults(
        "work",
        f"{_KERNELS}/work.py",
        "tests/test_kernel_work.py",
        {
            "the shortest term is the floor": ("bound = max(terms_s,", "bound = min(terms_s,"),
        },
    ),
    *faults(
        "work",
        f"{_KERNELS}/lite_mla/work.py",
        "tests/test_kernel_work.py",
        {"the larger order of the products": ("dim * min(dim, tokens)", "dim * max(dim, tokens)")},
    ),
    *faults(
        "work",
        f"{_KERNELS}/multi_scale_attention/work.py",
        "tests/test_kernel_work.py",
        {
            "padded tokens counted": ("+ (size % window) ** 2", "+ (size % window > 0) * window**2"),
        },
    ),
    *faults(
        "work",
        f"{_KERNELS}/cascaded_attention/work.py",
        "tests/test_kernel_work.py",
        {
            "windows at the edge not counted": ("batch * -(-height // window) *", "batch * (height // window) *"),
        },
    ),
    *faults(
        "work",
        f"{_KERNELS}/projected_multi_scale_attention/work.py",
        "tests/test_kernel_work.py",
        {
            "keys' and values' projection counted": ("tokens * 2 * 7 * channels**2", "tokens * 2 * 9 * channels**2"),
        },
    ),
    *faults(
        "benchmarks",
        "benchmarks/result.py",
        "tests/test_benchmarks.py",
        {
            "a value that does not count reaches its goal": (
                "counts = self.unstable or not self.reason",
                "counts = True",
            ),
        },
        "goal or judged or reached",
    ),
    *faults(
        "docs",
        "README.md",
        "tests/test_benchmarks.py",
        {"a figure that nobody measured": ("held-out accuracy 99.44% on", "held-out accuracy 99.94% on")},
        "results_say",
    ),
    *faults(
        "docs",
        "benchmarks/results/help-time.json",
        "tests/test_benchmarks.py",
        {"figures of a quick run published": ('"quick": false', '"quick": true')},
        "full_run",
    ),
)
