"""A plain LoRA as a ScalaBL adapter of the same weights, by the exact SVD of B A in every layer.

Stochastic layers in a loaded plain LoRA for as long as a context lasts: the same base, the same predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.core.modules import base_name
from scalabl.posterior.gaussian import POSTERIORS
from scalabl.posterior.joint import JointGaussian
from scalabl.predictive.lora_particles import lora_parts
from scalabl.training.posthoc.settings import refuse_options
from scalabl.tuner.config import SUPPORTED_LORA_OPTIONS, ScalaBLConfig
from scalabl.tuner.joint import set_joint
from scalabl.tuner.layers import active_adapters, unwrap
from scalabl.tuner.projection import StochasticProjection


@dataclass(frozen=True)
class Factors:
    """B A = up @ rows, one component a column and row.

    Attributes:
        rows: (r, d_in) orthonormal rows, V^T.
        up: (d_out, r) orthogonal columns, U diag(sv), sv falling.
    """

    rows: Tensor
    up: Tensor

    @property
    def singular_values(self) -> Tensor:
        """(r,) the lengths of the columns of `up`."""
        return self.up.norm(dim=0)


def factorise(a: Tensor, b: Tensor) -> Factors:
    """The SVD of B A, computed in float64 from two thin QR decompositions and one r x r SVD.

    Args:
        a: (r, d_in).
        b: (d_out, r).

    Returns:
        the factors in float32.

    Raises:
        UserError: r exceeds a dimension, or a weight is not finite.
    """
    if a.shape[0] > min(a.shape[1], b.shape[0]):
        raise UserError(
            f"r is {a.shape[0]}, but an adapted layer has only {min(a.shape[1], b.shape[0])} dimensions; train the "
            "adapter with a lower r."
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UserError("The adapter has weights that are not finite; restore its file or train it again.")
    q_up, r_up = torch.linalg.qr(b.detach().double())
    q_rows, r_rows = torch.linalg.qr(a.detach().double().T)
    u, singular_values, v_transposed = torch.linalg.svd(r_up @ r_rows.T)
    return Factors((v_transposed @ q_rows.T).float().contiguous(), (q_up @ (u * singular_values)).float().contiguous())


def scalabl_tensors(
    plain: dict[str, Tensor], config: ScalaBLConfig, stays_plain: Callable[[str], bool] = lambda _name: False
) -> dict[str, Tensor]:
    """The contents of a plain LoRA's file -> a ScalaBL adapter's, s = 1 and sigma = `init_sigma`.

    What is no LoRA weight (trained biases, modules_to_save) is carried as it is.

    Args:
        plain: the contents of `adapter_model.safetensors`.
        config: the ScalaBL adapter's.
        stays_plain: whether the adapter on the layer of a name has no posterior (`tuner.layers.without_rows`).

    Raises:
        UserError: a layer that is no linear one, or none at all.
    """
    made: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        if "lora_embedding_" in name or ("lora_" in name and not name.endswith((".lora_A.weight", ".lora_B.weight"))):
            raise UserError(f"The adapter has {name}, but only adapters of linear layers can be made Bayesian.")
        if not name.endswith((".lora_A.weight", ".lora_B.weight")) or stays_plain(name.rpartition(".lora_")[0]):
            made[name] = tensor
        elif name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            if tensor.dim() != 2 or f"{layer}.lora_B.weight" not in plain:
                raise UserError(f"The adapter has {name}, but only adapters of linear layers can be made Bayesian.")
            factors = factorise(tensor, plain[f"{layer}.lora_B.weight"])
            r = len(factors.rows)
            posterior = POSTERIORS[config.covariance](torch.ones(r), torch.full((r,), config.init_sigma))
            made[f"{layer}.lora_A.direction"] = factors.rows
            made |= {f"{layer}.lora_A.posterior.{key}": value for key, value in posterior.state_dict().items()}
            made[f"{layer}.lora_B.weight"] = factors.up
    if not any(name.endswith(".direction") for name in made):
        raise UserError("The adapter holds no LoRA weights; restore its file.")
    return made


def scalabl_config(plain: LoraConfig, **posterior: Any) -> ScalaBLConfig:
    """The ScalaBL configuration with the same targets, ranks and scaling.

    How A and B were drawn, and dropout, belong to a training that is over.

    Raises:
        UserError: an option of LoRA that ScalaBL cannot carry.
    """
    given = {field.name: getattr(plain, field.name) for field in fields(LoraConfig) if field.init}
    refuse_options({k: v for k, v in given.items() if k not in SUPPORTED_LORA_OPTIONS})
    kept = {k: v for k, v in given.items() if k in SUPPORTED_LORA_OPTIONS and k not in ("peft_type", "inference_mode")}
    return ScalaBLConfig(**{**kept, "init_lora_weights": True, "lora_dropout": 0.0}, **posterior)


def factors_of(model: nn.Module) -> dict[str, Factors]:
    """The SVD of every layer of the active adapter, by the layer's name.

    Raises:
        UserError: no LoRA layer, or a layer that is no linear one.
    """
    found = {}
    for name, parts in lora_parts(model).items():
        if not isinstance(parts.down, nn.Linear):
            raise UserError(f"{name} is no linear layer of a plain LoRA, so it cannot be made Bayesian.")
        found[name] = factorise(parts.a, parts.b)
    return found


class StochasticLeaves:
    """Leaves made once from a plain LoRA's factors, and put in place as often as they are needed.

    Args:
        factors: of every adapted layer, s = 1.
        joint: their joint covariance; None leaves them without one (to be fitted).
    """

    def __init__(self, factors: Mapping[str, Factors], joint: JointGaussian | None = None) -> None:
        self.factors = dict(factors)
        self.joint = joint
        self._leaves = {name: _leaf(f) for name, f in self.factors.items()}

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's active adapter is Bayesian."""
        adapter = active_adapters(unwrap(model))[0]
        layers = {
            base_name(name): module
            for name, module in unwrap(model).named_modules()
            if isinstance(module, LoraLayer) and base_name(name) in self.factors
        }
        before: dict[str, tuple[nn.Module, Tensor]] = {
            name: (layer.lora_A[adapter], layer.lora_B[adapter].weight.data)  # type: ignore[misc]
            for name, layer in layers.items()
        }
        try:
            for name, layer in layers.items():
                down, up = before[name]
                layer.lora_A[adapter] = self._leaves[name].to(device=up.device).train(down.training)
                layer.lora_B[adapter].weight.data = self.factors[name].up.to(up)
            set_joint(model, self.joint, adapter)
            yield
        finally:
            set_joint(model, None, adapter)
            for name, layer in layers.items():
                layer.lora_A[adapter], layer.lora_B[adapter].weight.data = before[name]


def _leaf(factors: Factors) -> StochasticProjection:
    with torch.random.fork_rng():  # the leaf draws an initial sigma, which is set below
        leaf = StochasticProjection(factors.rows, covariance="full")
    with torch.no_grad():
        leaf.direction.copy_(factors.rows)
        leaf.posterior.log_mean.zero_()
    return leaf.requires_grad_(False)
