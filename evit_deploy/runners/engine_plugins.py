"""The plugins that an engine calls in this process: found through its graph, registered before the engine is read."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from evit_deploy.errors import BundleError, RunnerError
from evit_deploy.trt.flavors import JIT, Flavor
from evit_deploy.trt.record import EngineRecord

if TYPE_CHECKING:
    from evit_deploy.runners.device import Device
    from evit_deploy.trt.operators import PluginLayer

log = logging.getLogger(__name__)


class EnginePlugins:
    """What one engine needs; nothing where its kernels are inside of it, or where it has no plugins.

    Args:
        record: the engine's.
        read_onnx: gives the graph that it was built from.
    """

    _in_use = False  # TensorRT's registry belongs to the process, and so does what launches the plugins' kernels

    def __init__(self, record: EngineRecord, read_onnx: Callable[[], bytes] | None) -> None:
        self.needed = bool(record.plugin["used"]) and record.plugin["form"] == JIT
        self._record = record
        self._read_onnx = read_onnx
        self._layers: list[PluginLayer] = []

    def kernel_hash(self) -> str | None:
        """Of the kernels that this version has for the engine's layers; None where none are needed.

        Raises:
            BundleError: nobody gave the graph.
        """
        if not self.needed:
            return None
        if self._read_onnx is None:
            raise BundleError(
                f"{self._record.engine_path} has plugins, and they are found through the graph that it was built from",
                hint="name its bundle as well",
            )
        from evit_deploy.trt.operators import plugin_layers
        from evit_deploy.trt.plugin_kernels import kernel_hash

        self._layers = plugin_layers(self._read_onnx())
        return kernel_hash(self._layers, self._record.plugin["arches"])

    def register(self, undo: ExitStack, flavor: Flavor, device: Device, logger: Any) -> None:
        """Find or compile the kernels for this GPU, and register the plugins until `undo`; after `kernel_hash`.

        Raises:
            RunnerError: another engine with plugins is active.
            EvitDeployError: a kernel is missing, or TensorRT does not take a plugin.
        """
        if not self.needed:
            return
        if EnginePlugins._in_use:
            raise RunnerError("another engine with plugins is active in this process", hint="deactivate it first")
        from evit_deploy.trt.plugin import register_plugins
        from evit_deploy.trt.plugin_kernels import compile_for

        compile_for(self._layers, [device.arch], log.info)
        names = sorted({layer.op_type for layer in self._layers})
        EnginePlugins._in_use = True
        undo.callback(setattr, EnginePlugins, "_in_use", False)
        undo.callback(register_plugins, flavor, names, form=JIT, arches=[device.arch], launcher=None)
        register_plugins(flavor, names, form=JIT, arches=[device.arch], launcher=device.launcher, logger=logger)

    def take_error(self) -> Exception | None:
        """What went wrong inside the plugins since the last call; TensorRT tells at most that something did."""
        if not self.needed:
            return None
        from evit_deploy.trt.plugin import take_plugin_errors

        return next(iter(take_plugin_errors()), None)
