"""One backward pass for a head of any number of classes: the difference of logits that matters most, as it is, and all
others as uncertain as the head's own weights make them.

A head's class logits are z = W h + b. Where the features h that it reads are equally uncertain in every direction,

    Cov h ~ alpha I    =>    Cov z ~ alpha W W^T = R R^T

with one number alpha for all rows. A row's probabilities p, with P = diag(p) - p p^T, turn this into an epistemic part
of tr(P R R^T) / 2, of which one difference of logits c^T z carries the most: c = P R R^T c, up to its length, by power
iterations from the most probable class against the others. A backward pass gives its variance v = c^T J Sigma J^T c,
beside the m = c^T R R^T c of the assumption. The Gaussian that is used has that variance in c, with g = R R^T c / m,

    Cov z ~ k (R R^T - m g g^T) + v g g^T        k = (v / m)^(1/4)

where a row that is more uncertain in c than assumed is taken to be so in the rest as well, but less: the power is
chosen by the exact Jacobians of three heads, of 20, 77 and 150 classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scalabl.tuner.layers import active_adapters, sequence_classifier, unwrap

_POWER = 0.25
_ITERATIONS = 8


def head_weight(model: nn.Module) -> Tensor | None:
    """W, (C, d), of a head's last layer; None of a model without one."""
    layer = head_layer(model)
    return None if layer is None else layer.weight


def head_layer(model: nn.Module) -> nn.Linear | None:
    """A head's last layer, the active adapter's own where it has one; None of a model without a head."""
    base = sequence_classifier(model)
    if base is None:
        return None
    active, found = active_adapters(unwrap(model)), None
    for name, module in base.named_modules():
        copy_of = name.partition("modules_to_save.")[2].partition(".")[0]  # an adapter's, behind the base's own
        if isinstance(module, nn.Linear) and module.out_features == base.config.num_labels:
            found = module if not copy_of or copy_of in active else found
    return found


def root_of(weight: Tensor) -> Tensor:
    """(C, R) root of W W^T, its columns by falling length, without the classes' common part, which no probability
    depends on."""
    weight = weight.detach().float()
    left, lengths, _ = torch.linalg.svd(weight - weight.mean(dim=0), full_matrices=False)
    return left * lengths


@dataclass(frozen=True)
class HeadFeatures:
    """Logits (B, C) under features that are equally uncertain in every direction.

    Attributes:
        root: R, (C, R).
        logits: (B, C) at the posterior mean.
    """

    root: Tensor
    logits: Tensor

    @property
    def contrast(self) -> Tensor:
        """c, (B, C), of unit length; zero of a row whose probabilities are 0 and 1."""
        p = self.logits.softmax(dim=-1)

        def unit(c: Tensor) -> Tensor:
            c = p * (c - (p * c).sum(dim=-1, keepdim=True))
            return c / c.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(c.dtype).tiny)

        c = unit(nn.functional.one_hot(p.argmax(dim=-1), p.shape[-1]).to(p))
        for _ in range(_ITERATIONS):
            c = unit(c @ self.root @ self.root.T)
        return c

    def shift(self, variance: Tensor, noise: Tensor) -> Tensor:
        """(P, B, C) deviations of the logits.

        Args:
            variance: v, (B,).
            noise: (P, R) standard normal.
        """
        a = self.contrast @ self.root  # (B, R), R^T c
        m = a.square().sum(dim=-1)
        ratio = torch.where(m > 0, variance / m.clamp_min(torch.finfo(m.dtype).tiny), 1.0)
        rest = ratio ** (_POWER / 2)
        g = (a @ self.root.T) / m.clamp_min(torch.finfo(m.dtype).tiny)[:, None]
        along = (noise @ a.T) * (ratio.sqrt() - rest)  # (P, B)
        return rest[:, None] * (noise @ self.root.T)[:, None] + along[..., None] * g


def feature_variance(root: Tensor, deviations: Tensor) -> float:
    """alpha of particles: by deviations (..., C) of the logits, each up to a constant, and R at alpha = 1."""
    centred = deviations - deviations.mean(dim=-1, keepdim=True)
    return float(centred.square().sum(dim=-1).mean() / root.to(centred).square().sum())


def half_variance(probs: Tensor, deviations: Tensor) -> Tensor:
    """Var_p d / 2, the epistemic uncertainty of each draw to second order, in nats.

    Args:
        probs: p, (n, C).
        deviations: d, (M, n, C) of the class logits, each up to a constant.

    Returns:
        (M, n).
    """
    centred = deviations - (probs * deviations).sum(dim=-1, keepdim=True)
    return (probs * centred.square()).sum(dim=-1) / 2
