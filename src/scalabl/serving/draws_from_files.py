"""The particles of an adapter directory, drawn from its files alone: what `scalabl.particles` draws on the model.

The noise is keyed by seed and layer name, both of which the files have. Sobol draws also depend on the layers' order in
the model, which the base model's configuration tells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.posterior.draws import noise
from scalabl.tuner.config import ScalaBLConfig
from scalabl.tuner.joint import load_joint
from scalabl.tuner.mean_adapter import stored_leaves


def particle_values(
    directory: Path, tensors: Mapping[str, Tensor], config: ScalaBLConfig, number: int, *, seed: int, draws: str
) -> dict[str, Tensor]:
    """s of N particles in every stochastic layer.

    Args:
        directory: the adapter's; its covariance between layers is used where it lies there.
        tensors: the contents of its `adapter_model.safetensors`.
        config: its configuration.
        number: N.
        seed: of the draws.
        draws: their kind (`scalabl.posterior.draws`).

    Returns:
        the prefix of the leaf's names in `tensors` -> s (N, r), float32.

    Raises:
        UserError: there is no stochastic layer, the joint covariance is over others, or Sobol draws of a base model
            whose configuration cannot be had.
    """
    leaves = stored_leaves(tensors, config.covariance)
    if not leaves:
        raise UserError(f"The adapter in {directory} has no stochastic layer; there is nothing to draw.")
    order = _model_order(config, leaves) if draws == "sobol" else list(leaves)
    drawn: Mapping[str, Tensor] = noise(draws, number, {layer: leaves[layer].posterior.r for layer in order}, seed)
    joint = load_joint(directory)
    if joint is not None:
        if dict(joint.ranks) != {layer: leaf.posterior.r for layer, leaf in leaves.items()}:
            raise UserError(f"The joint covariance in {directory} is over other layers than the adapter's; restore it.")
        drawn = joint.correlate(drawn)
    with torch.no_grad():
        return {leaf.prefix: leaf.posterior.sample(drawn[layer]) for layer, leaf in leaves.items()}


def _model_order(config: ScalaBLConfig, layers: Collection[str]) -> list[str]:
    """The layers as they stand in the model, which is built without weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = config.base_model_name_or_path or "(not named)"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Sobol draws depend on the order of the layers, and the configuration of the base model {name} cannot be "
            "read; put it where the adapter says, or choose other --draws."
        ) from error
    found = [module for module, _ in model.named_modules() if module in layers]
    if len(found) != len(layers):
        raise UserError(f"The base model {name} lacks layers that the adapter was made for; choose other --draws.")
    return found
