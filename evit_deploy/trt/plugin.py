"""Registering the fused operators with TensorRT, in the form that a flavor and a use ask for.

"aot": quickly deployable plugins; the kernels' PTX goes into the engine, which then needs nothing of ours.
"jit": IPluginV3 classes; the process that runs the engine registers them too, with a launcher.

None of these plugins has run on a GPU yet; building with them has.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from evit_deploy.errors import EvitDeployError, UsageError, unknown_name_hint
from evit_deploy.trt.flavors import AOT, JIT, Flavor
from evit_deploy.trt.operators import PLUGIN_NAMESPACE, PLUGIN_OPERATORS, PLUGIN_VERSION
from evit_deploy.trt.plugin_context import Launcher, PluginContext

__all__ = ["Launcher", "missing_plugins", "register_plugins", "take_plugin_errors"]

_log = logging.getLogger(__name__)
# TensorRT's registry belongs to the process, and so do these: flavor and form to context, and what keeps plugins alive.
_contexts: dict[tuple[str, str], PluginContext] = {}
_registered: dict[tuple[str, str], Any] = {}  # flavor and op_type to form and creator


def register_plugins(
    flavor: Flavor,
    op_types: Sequence[str],
    *,
    form: str,
    arches: Sequence[int],
    launcher: Launcher | None = None,
    logger: Any = None,
) -> list[str]:
    """Register plugins, before a graph is parsed or an engine opened; what is registered already is only updated.

    Args:
        flavor: whose registry.
        op_types: in PLUGIN_OPERATORS.
        form: AOT or JIT.
        arches: compute capabilities times ten that are built for; AOT takes one, the GPU's.
        launcher: of the current GPU, for JIT where engines run; None where they are only built.
        logger: TensorRT's, for errors inside plugins; Python's logging by default.

    Returns:
        The names registered, those of `op_types`.

    Raises:
        UsageError: a form the flavor does not have, or architectures that do not go with it.
        ValueError: an op_type that is no plugin.
        EvitDeployError: TensorRT does not take a plugin, or has one of the other form in this process.
    """
    unknown = [op_type for op_type in op_types if op_type not in PLUGIN_OPERATORS]
    if unknown:
        raise ValueError(f"no plugin for {unknown[0]!r}: {unknown_name_hint(unknown[0], PLUGIN_OPERATORS)}")
    if form not in flavor.plugin_forms:
        forms = ", ".join(flavor.plugin_forms)
        raise UsageError(f"{flavor.title} has no plugins of the form {form!r}, only {forms}", hint=f"--plugin {JIT}")
    if form == AOT and len(set(arches)) != 1:
        found = ", ".join(f"sm_{arch}" for arch in arches) or "none"
        raise UsageError(
            f"a plugin of the form {AOT} holds the kernel of one GPU, got {found}", hint="use --plugin jit"
        )
    context = _contexts.setdefault((flavor.name, form), PluginContext())
    context.renew(tuple(arches), launcher, _error_log(flavor, logger))
    for op_type in op_types:
        _register(flavor, op_type, form, context)
    missing = missing_plugins(flavor, op_types)
    if missing:
        raise EvitDeployError(f"{flavor.title} did not take the plugins {', '.join(missing)}")
    return list(op_types)


def missing_plugins(flavor: Flavor, op_types: Sequence[str]) -> list[str]:
    """Those that the registry does not know, and the parser would replace by their functions' bodies."""
    registry = flavor.trt.get_plugin_registry()
    return [op_type for op_type in op_types if registry.get_creator(op_type, PLUGIN_VERSION, PLUGIN_NAMESPACE) is None]


def take_plugin_errors() -> list[Exception]:
    """What went wrong inside plugins since the last call, oldest first; TensorRT itself only says that it failed."""
    return [error for context in _contexts.values() for error in context.take_errors()]


def _register(flavor: Flavor, op_type: str, form: str, context: PluginContext) -> None:
    key = (flavor.name, op_type)
    if key in _registered:
        registered_form, _ = _registered[key]
        if registered_form != form:
            raise EvitDeployError(
                f"{op_type} is registered as {registered_form} in this process, and cannot be {form} as well",
                hint="use another process",
            )
        return
    operator = PLUGIN_OPERATORS[op_type]
    if form == AOT:
        from evit_deploy.trt.plugin_qdp import register_qdp

        register_qdp(operator, context)
        _registered[key] = (form, None)
    else:
        from evit_deploy.trt.plugin_v3 import make_creator

        creator = make_creator(flavor.trt, operator, context)
        flavor.trt.get_plugin_registry().register_creator(creator, PLUGIN_NAMESPACE)
        _registered[key] = (form, creator)


def _error_log(flavor: Flavor, logger: Any) -> Any:
    if logger is None:
        return _log.error
    return lambda line: logger.log(flavor.trt.ILogger.Severity.ERROR, line)
