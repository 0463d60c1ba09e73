"""Faults of the product's gates and guarantees, by area."""

from __future__ import annotations

from tests.mutants.gates_engines import ENGINE_FAULTS
from tests.mutants.gates_files import FILE_FAULTS
from tests.mutants.gates_graphs import GRAPH_FAULTS
from tests.mutants.gates_parity import PARITY_FAULTS

GATE_FAULTS = PARITY_FAULTS + FILE_FAULTS + GRAPH_FAULTS + ENGINE_FAULTS
