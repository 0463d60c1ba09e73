"""The blocks of a model by name, in the order the data passes them: where a parity failure is looked for."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

_BLOCK = re.compile(r"(stem|patch_embed|stages\.\d+\.(transition|downsample)|stages\.\d+\.blocks\.\d+)")


def block_names(model: nn.Module) -> list[str]:
    """Names of the submodules that count as blocks: the stem, each stage's transition and each of its blocks.

    Every one of them runs once and returns one map [B, C, H, W]; identities are left out.
    """
    return [
        name for name, module in model.named_modules() if _BLOCK.fullmatch(name) and not isinstance(module, nn.Identity)
    ]


def hook_blocks(
    model: nn.Module, visit: Callable[[str, Tensor], Tensor | None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `visit(name, output)` after each block's forward; a tensor it returns replaces the output.

    Returns:
        The hooks' handles; the caller removes them.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        return lambda module, inputs, output: visit(name, output)

    modules = dict(model.named_modules())
    return [modules[name].register_forward_hook(hook(name)) for name in block_names(model)]


def block_outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Run the model and keep what each block returned.

    Args:
        images: [B, 3, S, S]

    Returns:
        Maps [B, C, H, W] by block name, in the order of execution.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        kept[name] = output

    handles = hook_blocks(model, keep)
    try:
        with torch.inference_mode():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return kept
