"""TensorRT: engines from a bundle's graph, built with either flavor, with the fused attention as a plugin or without.

flavors.py    the two TensorRTs behind one adapter
plan.py       what a build would do
build.py      `build_engine`: reuse, build, keep
child.py      the process that builds, seen from outside; child_main.py and builder.py are inside
staging.py    how an engine gets into its bundle
record.py     an engine's JSON, and opening an engine with checks

No engine has run on a GPU yet.
"""

from __future__ import annotations

from evit_deploy.trt.build import BuildOptions, BuildPlan, BuildResult, build_engine, plan_build
from evit_deploy.trt.record import EngineRecord, check_runnable, engines_of, open_engine

__all__ = [
    "BuildOptions",
    "BuildPlan",
    "BuildResult",
    "EngineRecord",
    "build_engine",
    "check_runnable",
    "engines_of",
    "open_engine",
    "plan_build",
]
