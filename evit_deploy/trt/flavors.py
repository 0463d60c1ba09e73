"""The two TensorRTs behind one adapter: which one to take, and the imported bindings with what they can do.

Only names that 10.16, 11.x and TensorRT for RTX share are used elsewhere in this package; where they differ, the
difference is a property here.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from evit_deploy.environment import find_gpus, package_version, python_command
from evit_deploy.errors import MissingDependencyError, UsageError, unknown_name_hint

TENSORRT = "tensorrt"  # for data-centre GPUs, workstations and Jetson: builds on the GPU that it builds for
RTX = "rtx"  # TensorRT for RTX: builds without a GPU, and finishes the work where the engine is loaded
AUTO = "auto"
FLAVORS = (TENSORRT, RTX)

AOT = "aot"  # the kernel's PTX inside the engine
JIT = "jit"  # a plugin class that must be registered where the engine is loaded

# The oldest versions that were tried: before 10.16 the parser chooses between plugin and function by other rules.
MIN_VERSIONS = {TENSORRT: (10, 16), RTX: (1, 7)}
_MODULES = {TENSORRT: ("tensorrt",), RTX: ("tensorrt_rtx_bindings", "tensorrt_rtx")}
_INSTALL = {
    TENSORRT: "tensorrt-cu13==11.4.0.106",
    RTX: "tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116",
}
_TITLES = {TENSORRT: "TensorRT", RTX: "TensorRT for RTX"}

_PROBE_TIMEOUT_S = 120  # the first import of TensorRT's libraries from a cold network disk takes a minute


@dataclass(frozen=True)
class Flavor:
    """One TensorRT, imported.

    Attributes:
        name: TENSORRT or RTX.
        trt: the module of its bindings.
        version: as the bindings say, for example "11.4.0.106".
    """

    name: str
    trt: Any
    version: str

    @property
    def title(self) -> str:
        return f"{_TITLES[self.name]} {self.version}"

    @property
    def has_qdp(self) -> bool:
        """Whether a plugin can put its kernel into the engine (quickly deployable plugins)."""
        return self.name == TENSORRT

    @property
    def plugin_form(self) -> str:
        """The form of plugin to take where none is asked for."""
        return AOT if self.has_qdp else JIT

    @property
    def plugin_forms(self) -> tuple[str, ...]:
        return (AOT, JIT) if self.has_qdp else (JIT,)

    @property
    def known_targets(self) -> tuple[str, ...]:
        """What --targets takes, ("sm75", ...); nothing where an engine is for the GPU of the build."""
        members = getattr(self.trt, "ComputeCapability", None)
        if self.name != RTX or members is None:
            return ()
        names = (name.lower() for name in members.__members__)
        return tuple(sorted((n for n in names if re.fullmatch(r"sm\d+", n)), key=lambda n: int(n[2:])))

    def network_flags(self, plugin_form: str | None) -> int:
        """The bit mask for create_network: strongly typed, and which form a plugin that has both takes."""
        flags = self.trt.NetworkDefinitionCreationFlag.__members__
        wanted = ["STRONGLY_TYPED"]
        if plugin_form is not None:
            wanted.append(f"PREFER_{plugin_form.upper()}_PYTHON_PLUGINS")
        mask = 0
        for name in wanted:
            if name in flags:  # their numbers differ between versions
                mask |= 1 << int(flags[name])
        return mask


def choose_flavor(name: str) -> tuple[str, str]:
    """Which flavor a name means here, and why; imports no bindings into this process.

    Args:
        name: AUTO, TENSORRT or RTX.

    Raises:
        UsageError: another name.
    """
    if name in FLAVORS:
        return name, "asked for"
    if name != AUTO:
        raise UsageError(f"unknown flavor {name!r}", hint=unknown_name_hint(name, (AUTO, *FLAVORS)))
    gpus = find_gpus()
    if not gpus:
        return RTX, "no GPU answers, and TensorRT for RTX builds without one"
    failure = _import_failure(TENSORRT)
    if failure is None:
        return TENSORRT, f"TensorRT imports and {gpus[0].name} answers"
    return RTX, f"{gpus[0].name} answers, and TensorRT does not import here ({failure})"


def load_flavor(name: str) -> Flavor:
    """Import the bindings of a flavor.

    Raises:
        MissingDependencyError: they are not installed, cannot be imported, or are too old.
    """
    module = _import_bindings(name)
    version = str(getattr(module, "__version__", ""))
    if _release(version) < MIN_VERSIONS[name]:
        needed = ".".join(map(str, MIN_VERSIONS[name]))
        reason = (
            "before that the parser chooses between a plugin and a function by other rules"
            if name == TENSORRT
            else "no older one was tried"
        )
        raise MissingDependencyError(
            f"{_TITLES[name]} {version or 'of unknown version'} is too old: {needed} or later is needed, {reason}",
            hint=_install_command(name),
        )
    return Flavor(name, module, version)


def require_gpu_for(name: str) -> None:
    """Refuse a build that needs a GPU on a machine without one.

    Raises:
        MissingDependencyError: flavor TENSORRT, and no GPU answers.
    """
    if name == TENSORRT and not find_gpus():
        raise MissingDependencyError(
            "flavor tensorrt builds an engine on the GPU that it is for, and no GPU answers here",
            hint="--flavor rtx builds without one; or run this where nvidia-smi lists a GPU",
        )


def _import_bindings(name: str) -> ModuleType:
    reasons = []
    for module in _MODULES[name]:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                reasons.append(f"{module}: {error}")
        except Exception as error:  # noqa: BLE001 - a front-end without its libraries raises whatever it likes
            reasons.append(f"{module}: {_first_line(error)}")
    if not reasons:
        raise MissingDependencyError(f"{_TITLES[name]} is not installed", hint=_install_command(name))
    raise MissingDependencyError(f"{_TITLES[name]} cannot be imported, {reasons[0]}", hint=_install_command(name))


@cache
def _import_failure(name: str) -> str | None:
    """Why a flavor does not import, tried in a process of its own; None when it does."""
    if not any(find_spec(module) for module in _MODULES[name]):
        return "it is not installed"
    command = [sys.executable, "-c", f"import {_MODULES[name][0]}"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"its import takes longer than {_PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"its import ends the process with code {done.returncode}"


def _install_command(name: str) -> str:
    return f"{python_command()} {_INSTALL[name]}"


def installed_version(name: str) -> str | None:
    """The version of a flavor's packages without importing them, None where there are none."""
    return package_version("tensorrt" if name == TENSORRT else "tensorrt_rtx")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
