"""A joint covariance on a model: every draw and every linearisation of s then keeps the correlations between layers.

It belongs to one adapter and is used where that adapter alone is active. Fresh draws while training (`sample`) know
each layer's own covariance only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT, sha256
from scalabl.posterior.gaussian import FullGaussian, Gaussian
from scalabl.posterior.joint import JointGaussian
from scalabl.tuner.layers import active_adapters, stochastic_layers, unwrap

_ATTRIBUTE = "_scalabl_joint"


def set_joint(model: nn.Module, joint: JointGaussian | None, adapter: str | None = None) -> None:
    """Give an adapter a joint covariance, and each of its layers the layer's own part of it; None takes it away.

    Args:
        model: a PEFT model whose layers have a full covariance.
        joint: over all its stochastic layers, in any order.
        adapter: its name; the active one if None.

    Raises:
        UserError: the layers or their ranks are others, or a layer's covariance is not full.
    """
    name = adapter if adapter is not None else active_adapters(unwrap(model))[0]
    joints: dict[str, JointGaussian] = unwrap(model).__dict__.setdefault(_ATTRIBUTE, {})
    if joint is None:
        joints.pop(name, None)
        return
    leaves = stochastic_layers(model, name)
    if {layer: leaf.out_features for layer, leaf in leaves.items()} != dict(joint.ranks):
        raise UserError("The joint covariance is over other layers than the adapter's; make it again for this adapter.")
    for layer, factor in joint.marginals.items():
        _set_cholesky(leaves[layer].posterior, factor)
    joints[name] = joint.to(next(iter(leaves.values())).direction.device)


@torch.no_grad()
def _set_cholesky(posterior: Gaussian, factor: Tensor) -> None:
    if not isinstance(posterior, FullGaussian):
        raise UserError('A joint covariance needs layers with covariance="full", but this adapter\'s are diagonal.')
    rows, columns = torch.tril_indices(posterior.r, posterior.r, offset=-1, device=factor.device)
    posterior.log_std.copy_(factor.diagonal().log())
    posterior.lower.copy_(factor[rows, columns])


def joint_of(model: nn.Module) -> JointGaussian | None:
    """The joint covariance of the one active adapter, or None."""
    joints = unwrap(model).__dict__.get(_ATTRIBUTE)
    if not joints:
        return None
    active = active_adapters(unwrap(model))
    return joints.get(active[0]) if len(active) == 1 else None


def correlated(model: nn.Module, noise: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Independent standard normal noise (N, r) by layer, with the joint's correlations where the model has one."""
    joint = joint_of(model)
    return noise if joint is None else joint.correlate(noise)


def save_joint(directory: Path, joint: JointGaussian) -> str:
    """Write `joint_covariance.safetensors`, tied to the adapter beside it; returns the file's SHA-256."""
    path = directory / JOINT
    tensors = {"factor": joint.factor.cpu().contiguous(), "ranks": torch.tensor(list(joint.ranks.values()))}
    metadata = {"layers": "\n".join(joint.ranks), "adapter_sha256": sha256(directory / ADAPTER)}
    save_file(tensors, path, metadata=metadata)
    return sha256(path)


def load_joint(directory: Path) -> JointGaussian | None:
    """What `save_joint` wrote; None where there is no such file.

    Raises:
        UserError: the file is truncated or altered, or the adapter beside it has changed since.
    """
    path = directory / JOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, factor, ranks = (
                file.metadata() or {},
                file.get_tensor("factor"),
                file.get_tensor("ranks").tolist(),
            )
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or altered ({error}); restore the file.") from error
    if metadata.get("adapter_sha256") != sha256(directory / ADAPTER):
        raise UserError(f"{path} belongs to another adapter than the one beside it; restore the file or delete it.")
    return JointGaussian(factor, dict(zip(metadata["layers"].split("\n"), ranks, strict=True)))
