"""Which kernels models need, and having them compiled, kept and packed: what `evit-deploy kernels` does.

No kernel here has run on a GPU yet; what is known of one is what ptxas says of it.
"""

from evit_deploy.kernels.compiling import Compilation, compile_kernels, list_kernels
from evit_deploy.kernels.needed import DTYPES, NeededKernel, needed_kernels
from evit_deploy.kernels.packing import pack_kernels, unpack_kernels
from evit_deploy.kernels.rows import ABSENT, CACHED, COMPILED, FAILED, REFUSED, KernelRow

__all__ = [
    "ABSENT",
    "CACHED",
    "COMPILED",
    "DTYPES",
    "FAILED",
    "REFUSED",
    "Compilation",
    "KernelRow",
    "NeededKernel",
    "compile_kernels",
    "list_kernels",
    "needed_kernels",
    "pack_kernels",
    "unpack_kernels",
]
