"""A covariance between layers beside an adapter that has none."""

from pathlib import Path

import torch
from tiny_base import loaded

from scalabl.posterior.joint import JointGaussian
from scalabl.runs.loading import load_adapter
from scalabl.tuner import stochastic_layers
from scalabl.tuner.joint import save_joint, set_joint


def add_joint(directory: Path) -> None:
    """Correlations of 0.8 between any two numbers; the adapter's own covariances become its blocks."""
    model = load_adapter(loaded()[0], directory)
    ranks = {name: leaf.out_features for name, leaf in stochastic_layers(model).items()}
    size = sum(ranks.values())
    std = 0.3 + 0.2 * torch.rand(size, generator=torch.Generator().manual_seed(5)).double()
    correlation = 0.2 * torch.eye(size).double() + 0.8
    joint = JointGaussian(torch.linalg.cholesky(torch.outer(std, std) * correlation).float(), ranks)
    set_joint(model, joint)
    model.save_pretrained(str(directory))
    save_joint(directory, joint)
