"""Which weights a report was measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def weights_digest(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of the tensors, in the order of their names.

    Args:
        state_dict: canonical keys, on the CPU, as a checkpoint or a bundle gives them.

    Returns:
        64 hexadecimal digits; equal for equal weights, wherever they were read from.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        array = state_dict[name].detach().contiguous().cpu().numpy()
        digest.update(f"{name} {array.dtype.str} {list(array.shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
