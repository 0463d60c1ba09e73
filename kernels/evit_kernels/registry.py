"""Every operator with its faces, for code that treats them alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from evit_kernels.cascaded_attention import naive as cascaded_attention_definition
from evit_kernels.cascaded_attention import op as cascaded_attention_op
from evit_kernels.cascaded_attention import work as cascaded_attention_work
from evit_kernels.launch import KernelLaunch
from evit_kernels.lite_mla import naive as lite_mla_definition
from evit_kernels.lite_mla import op as lite_mla_op
from evit_kernels.lite_mla import work as lite_mla_work
from evit_kernels.multi_scale_attention import naive as multi_scale_attention_definition
from evit_kernels.multi_scale_attention import op as multi_scale_attention_op
from evit_kernels.multi_scale_attention import work as multi_scale_attention_work
from evit_kernels.projected_multi_scale_attention import naive as projected_multi_scale_attention_definition
from evit_kernels.projected_multi_scale_attention import op as projected_multi_scale_attention_op
from evit_kernels.projected_multi_scale_attention import work as projected_multi_scale_attention_work
from evit_kernels.work import Work


@dataclass(frozen=True)
class Operator:
    """One operator; the functions take the same arguments.

    Attributes:
        name: as in `torch.ops.evit`.
        definition: plain PyTorch, any dtype.
        call: the PyTorch operator, which picks a face by device.
        fused: the kernel.
        launch_of: the launch that a call is; takes tensors of any device, meta included.
        work_of: the least that a call has to do; takes tensors of any device, meta included.
    """

    name: str
    definition: Callable[..., Tensor]
    call: Any
    fused: Callable[..., Tensor]
    launch_of: Callable[..., KernelLaunch]
    work_of: Callable[..., Work]


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "multi_scale_attention",
            multi_scale_attention_definition.multi_scale_attention,
            multi_scale_attention_op.multi_scale_attention,
            multi_scale_attention_op.fused_multi_scale_attention,
            multi_scale_attention_op.launch_of,
            multi_scale_attention_work.work_of,
        ),
        Operator(
            "projected_multi_scale_attention",
            projected_multi_scale_attention_definition.projected_multi_scale_attention,
            projected_multi_scale_attention_op.projected_multi_scale_attention,
            projected_multi_scale_attention_op.fused_projected_multi_scale_attention,
            projected_multi_scale_attention_op.launch_of,
            projected_multi_scale_attention_work.work_of,
        ),
        Operator(
            "lite_mla",
            lite_mla_definition.lite_mla,
            lite_mla_op.lite_mla,
            lite_mla_op.fused_lite_mla,
            lite_mla_op.launch_of,
            lite_mla_work.work_of,
        ),
        Operator(
            "cascaded_attention",
            cascaded_attention_definition.cascaded_attention,
            cascaded_attention_op.cascaded_attention,
            cascaded_attention_op.fused_cascaded_attention,
            cascaded_attention_op.launch_of,
            cascaded_attention_work.work_of,
        ),
    )
}
