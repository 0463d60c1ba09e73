"""The reference modules: what a spec is as a PyTorch module whose state_dict keys are the canonical ones."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from evit_deploy.specs import ModelSpec


def build_model(spec: ModelSpec) -> nn.Module:
    """The reference module of a spec: images [B, 3, S, S] to logits [B, num_classes], random weights, evaluation mode.

    Under `torch.device("meta")` it costs no memory and still has the names and shapes of every tensor.

    Raises:
        MissingDependencyError: the family needs timm and timm is not there.
    """
    if spec.family == "msa":
        from evit_deploy.models.msa import build_msa

        return build_msa(spec)
    if spec.family == "mit":
        from evit_deploy.models.mit import build_mit

        return build_mit(spec)
    if spec.family == "msra":
        from evit_deploy.models.msra import build_msra

        return build_msra(spec)
    raise ValueError(f"no such family, got {spec.family=}")


def load_model(spec: ModelSpec, state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The reference module with a checkpoint's weights (copied), in evaluation mode.

    Args:
        state_dict: canonical keys, float32, as `load_checkpoint` returns them.

    Raises:
        RuntimeError: a key is missing, unused or of another shape; `load_checkpoint` has checked this already.
    """
    model = build_model(spec)
    model.load_state_dict(state_dict, strict=True)
    return model
