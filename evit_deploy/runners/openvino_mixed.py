"""Mixed precision in OpenVINO: BF16, and FP32 where BF16's eight bits cost much accuracy and FP32 costs little time.

OpenVINO's precision hint is for all layers. An attribute keeps a layer from it, which Python can set in an IR only: the
network is written to a temporary folder, its description is marked, and it is read back. Layers that are no convolution
may ignore the attribute, a classifier's matrix product does; so it becomes a convolution first.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from evit_deploy.errors import RunnerError

if TYPE_CHECKING:
    import openvino

MIXED_NOTE = (
    "OpenVINO computes in BF16, in FP32 the first convolution, sums of depthwise convolutions, gates and "
    "the classifier's last layer"
)

_ACTIVATIONS = frozenset({"ReLU", "HSwish"})
_PARTS = frozenset({"Split", "VariadicSplit"})
_SMALL_SIZES = 2  # so many sizes of map are small, from the smallest on: the last two stages
_PRODUCTS = frozenset({"Convolution", "MatMul"})
_PRECISE = {"name": "precise", "version": "0"}
_PLAIN_INPUT = {"name": "primitives_priority", "version": "0", "value": "cpu:jit_avx512"}  # the image as it comes


def keep_in_fp32(core: openvino.Core, network: openvino.Model, runner: str) -> openvino.Model:
    """The network with the layers marked that stay in FP32 when it is compiled for BF16.

    Raises:
        RunnerError: the temporary folder cannot be written to.
    """
    import openvino

    try:
        with tempfile.TemporaryDirectory(prefix="evit-deploy-") as folder:
            description, weights = Path(folder, "network.xml"), Path(folder, "network.bin")
            openvino.serialize(network, description, weights)
            tree = ElementTree.parse(description).getroot()  # written by OpenVINO a moment ago
            data = weights.read_bytes()
    except (OSError, RuntimeError) as error:
        where = tempfile.gettempdir()
        raise RunnerError(
            f"{runner}: the graph cannot be written to {where}: {' '.join(str(error).split())}",
            hint="free some space there, or set TMPDIR",
        ) from error
    mark_layers(tree)
    return core.read_model(ElementTree.tostring(tree), data)


def mark_layers(tree: ElementTree.Element) -> list[str]:
    """Give OpenVINO's attribute to the layers that stay in FP32, in place; returns their names in order.

    The first convolution is also told to use code that reads the channels one after the other, where there is such
    code: what OpenVINO takes by itself has the image reordered first, which in FP32 costs more than the convolution.
    """
    network = _Network(tree)
    kept = network.up_to_the_first_convolution() | network.sums() | network.gates() | network.classifier()
    names = []
    for layer in network.layers:
        if layer.get("id") in kept:
            info = layer.find("rt_info")
            if info is None:
                info = ElementTree.SubElement(layer, "rt_info")
            ElementTree.SubElement(info, "attribute", _PRECISE)
            if layer.get("id") == network.first_convolution():
                ElementTree.SubElement(info, "attribute", _PLAIN_INPUT)
            names.append(layer.get("name", ""))
    return names


class _Network:
    """The layers of an IR by id: what they read, who reads them, and which of them hold what follows the image."""

    def __init__(self, tree: ElementTree.Element) -> None:
        self.layers = list(tree.iterfind("layers/layer"))  # each after those that it reads
        self.kinds = {layer.get("id", ""): layer.get("type", "") for layer in self.layers}
        self.shapes = {
            layer.get("id", ""): [int(size.text or 0) for size in layer.findall("output/port[1]/dim")]
            for layer in self.layers
        }
        self.sources: dict[str, list[str]] = defaultdict(list)
        self.readers: dict[str, list[str]] = defaultdict(list)
        for edge in tree.iterfind("edges/edge"):
            source, reader = edge.get("from-layer", ""), edge.get("to-layer", "")
            self.sources[reader].append(source)
            if self.kinds[reader] != "ShapeOf":
                self.readers[source].append(reader)
        self.maps: dict[str, None] = {}  # an ordered set
        for layer, kind in self.kinds.items():
            if kind == "Parameter" or (kind not in ("ShapeOf", "Result") and self.maps.keys() & self.sources[layer]):
                self.maps[layer] = None

    def first_convolution(self) -> str | None:
        return next((layer for layer in self.maps if self.kinds[layer] == "Convolution"), None)

    def up_to_the_first_convolution(self) -> set[str]:
        """From the image to the first convolution's activation: few weights, and all that is seen goes through them."""
        layer = self.first_convolution()
        if layer is None:
            return set()
        before = list(self.maps)
        kept = {*before[: before.index(layer) + 1]}
        while len(self.readers[layer]) == 1 and self._follows(self.readers[layer][0]):
            layer = self.readers[layer][0]
            kept.add(layer)
        return kept

    def sums(self) -> set[str]:
        """Where blocks add depthwise convolutions to their maps: those, and all sums, of small maps.

        Such blocks, those of `msra`, add several times each; where blocks add once, FP32 wins nothing. Larger maps cost
        more time and win little. Nor are sums with a part of a map kept, as between the heads of `msra`: both terms
        come in BF16 and the sum goes on in BF16.
        """
        sums = [
            layer
            for layer in self.maps
            if self._adds_maps(layer) and not any(self.kinds[term] in _PARTS for term in self.sources[layer])
        ]
        small = sorted({self._size(layer) for layer in sums})[:_SMALL_SIZES]
        kept = [layer for layer in sums if self._size(layer) in small]
        depthwise = set()
        for bias in (term for layer in kept for term in self.sources[layer]):
            if self.kinds[bias] == "Add" and self.kinds[self.sources[bias][0]] == "GroupConvolution":
                depthwise |= {bias, self.sources[bias][0]}
        return {*kept, *depthwise} if depthwise else set()

    def gates(self) -> set[str]:
        """Each Sigmoid and what it scales."""
        gates = [layer for layer in self.maps if self.kinds[layer] == "Sigmoid"]
        return {*gates, *(reader for gate in gates for reader in self.readers[gate])}

    def classifier(self) -> set[str]:
        """From behind the last mean to the output, but for products before the last: large weights, and little error.

        Nor the mean itself: it adds up in FP32 whatever its map is in, and asked for FP32 it has the map reordered.
        """
        maps = list(self.maps)
        means = [place for place, layer in enumerate(maps) if self.kinds[layer] == "ReduceMean"]
        layers = maps[means[-1] + 1 :] if means else []
        products = [layer for layer in layers if self.kinds[layer] in _PRODUCTS]
        return {*layers} - {*products[:-1]}

    def _follows(self, layer: str) -> bool:
        """Whether a layer is the bias or the activation of the one before."""
        return self.kinds[layer] in _ACTIVATIONS or (self.kinds[layer] == "Add" and not self._adds_maps(layer))

    def _size(self, layer: str) -> int:
        """How many values of one image a layer makes."""
        return math.prod(self.shapes[layer][1:])

    def _adds_maps(self, layer: str) -> bool:
        return self.kinds[layer] == "Add" and self.maps.keys() >= set(self.sources[layer])
