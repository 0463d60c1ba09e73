"""All planted faults."""

from __future__ import annotations

from tests.mutants.definitions import DEFINITION_FAULTS
from tests.mutants.fault import Fault
from tests.mutants.gates import GATE_FAULTS
from tests.mutants.kernels import KERNEL_FAULTS

FAULTS: tuple[Fault, ...] = KERNEL_FAULTS + DEFINITION_FAULTS + GATE_FAULTS
