"""From the bytes of an ONNX file to a TensorRT network, and what became of its attention layers there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evit_deploy.constants import OPERATOR_DOMAIN
from evit_deploy.errors import EngineError
from evit_deploy.trt.flavors import Flavor

MAX_PARSER_LINES = 8
PLUGIN_VERSION = "1"


class PluginUnusedError(EngineError):
    """The plugin was asked for, and TensorRT does not take it: a build without it may follow."""


@dataclass(frozen=True)
class ParsedNetwork:
    """A network and what has to live as long as it does.

    Attributes:
        network: the INetworkDefinition.
        parser: owns the weights that the network refers to.
        onnx_bytes: those weights lie in it.
        plugin_layers: names of the layers that are plugins, in the network's order.
    """

    network: Any
    parser: Any
    onnx_bytes: bytes
    plugin_layers: tuple[str, ...]


def network_from_onnx(
    flavor: Flavor,
    builder: Any,
    logger: Any,
    onnx_bytes: bytes,
    *,
    plugin_form: str | None = None,
    op_types: Sequence[str] = (),
    expected_plugins: int = 0,
) -> ParsedNetwork:
    """Parse an ONNX file.

    Args:
        flavor: the TensorRT.
        builder, logger: its objects.
        onnx_bytes: the file.
        plugin_form: "aot" or "jit" where the attention layers are to be plugins, None where they are not.
        op_types: the plugins' names.
        expected_plugins: how many layers have to be plugins.

    Raises:
        EngineError: the parser refuses the file; the details have the node and the reason.
        PluginUnusedError: a plugin is not in the registry, or another number of layers than expected are plugins.
    """
    trt = flavor.trt
    if plugin_form is not None:
        _require_registered(builder, op_types)
    network = builder.create_network(flavor.network_flags(plugin_form))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_bytes):
        raise EngineError(
            f"{flavor.title} cannot parse the ONNX file{_first_node(parser)}",
            _parser_lines(parser),
            hint="the bundle is as it was; evit-deploy verify shows whether the file itself is sound",
        )
    if network.num_outputs == 0:
        raise EngineError(
            f"{flavor.title} finds no outputs in the ONNX file",
            hint="export the bundle again, or restore it from a copy",
        )
    plugins = plugin_layers_of(trt, network)
    if plugin_form is not None and len(plugins) != expected_plugins:
        raise PluginUnusedError(
            f"{flavor.title} took {len(plugins)} of {expected_plugins} attention layers as plugins",
            hint="--no-plugin builds with TensorRT's own layers",
        )
    return ParsedNetwork(network, parser, onnx_bytes, plugins)


def plugin_layers_of(trt: Any, network: Any) -> tuple[str, ...]:
    """Names of the layers of a network that are plugins."""
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return tuple(str(layer.name) for layer in layers if layer.type == trt.LayerType.PLUGIN_V3)


def _require_registered(builder: Any, op_types: Sequence[str]) -> None:
    registry = builder.get_plugin_registry()
    missing = [name for name in op_types if registry.get_creator(name, PLUGIN_VERSION, OPERATOR_DOMAIN) is None]
    if missing:
        raise PluginUnusedError(
            f"the plugin {missing[0]} is not in TensorRT's registry, version {PLUGIN_VERSION}, namespace "
            f"{OPERATOR_DOMAIN}",
            hint="--no-plugin builds with TensorRT's own layers",
        )


def _parser_errors(parser: Any) -> list[Any]:
    return [parser.get_error(index) for index in range(parser.num_errors)]


def _first_node(parser: Any) -> str:
    for error in _parser_errors(parser):
        name, operator = _text(error, "node_name"), _text(error, "node_operator")
        if name or operator:
            return f", it stops at node {name or '(without a name)'}" + (f" ({operator})" if operator else "")
    return ""


def _parser_lines(parser: Any) -> list[str]:
    """One line per parser error: the node, and the reason as the parser gives it."""
    lines = []
    for error in _parser_errors(parser)[:MAX_PARSER_LINES]:
        node = _text(error, "node_name") or "(no node)"
        operator = _text(error, "node_operator")
        reason = " ".join(_text(error, "desc").split()) or "no reason given"
        lines.append(f"{node}{f' ({operator})' if operator else ''}: {reason}")
    return lines or ["the parser gave no reason"]


def _text(error: Any, method: str) -> str:
    function = getattr(error, method, None)
    return "" if function is None else str(function() or "")
