"""ScalaBLModel: PEFT's LoraModel whose every A is a stochastic leaf."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from scalabl.errors import UserError
from scalabl.tuner.config import ScalaBLConfig
from scalabl.tuner.fingerprint import fingerprint
from scalabl.tuner.projection import StochasticProjection


class ScalaBLModel(LoraModel):
    """LoRA's own layers, with `lora_A[adapter]` swapped for a `StochasticProjection`.

    Everything that PEFT does with a LoRA layer (quantised bases, merging, several adapters, disabling) stays
    PEFT's; the noise lives in the leaf alone.

    Raises:
        UserError: no module matches, a target is not a linear layer, r exceeds a layer, or the adapter was made
            for another base model.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        found = fingerprint(model)
        if config.base_fingerprint is None:
            config.base_fingerprint = found
        elif found is not None and config.base_fingerprint != found:
            raise UserError(
                "This adapter was trained on another base model (its fingerprint is "
                f"{config.base_fingerprint}, this model's is {found}); load the base model named in "
                f"adapter_config.json ({config.base_model_name_or_path})."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _create_and_replace(
        self,
        lora_config: ScalaBLConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if isinstance(base, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
            raise UserError(
                f"ScalaBL adapts linear layers, but {current_key} is a {type(base).__name__}; remove it from "
                "target_modules."
            )
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        plain = layer.lora_A[adapter_name]
        if not isinstance(plain, nn.Linear):
            raise UserError(f"ScalaBL cannot adapt {current_key}, a {type(base).__name__}; remove it from target_modules.")
        r, smallest = plain.out_features, min(layer.in_features, layer.out_features)
        if r > smallest:
            raise UserError(
                f"r is {r}, but {current_key} has only {smallest} dimensions; lower r, or give this layer its own "
                "rank in rank_pattern."
            )
        leaf = StochasticProjection(
            plain.weight,
            covariance=lora_config.covariance,
            init_sigma=lora_config.init_sigma,
            unit_rows=lora_config.unit_rows,
        )
        leaf.requires_grad_(plain.weight.requires_grad).train(plain.training)
        layer.lora_A[adapter_name] = leaf

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the adapter's name right before the parameter; ours has the posterior in between
        key = key.replace(f".lora_A.{adapter_name}.posterior.", ".lora_A.posterior.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not supported: a weighted sum of Gaussians over different subspaces is no Gaussian over s."""
        raise UserError("ScalaBL adapters cannot be combined with add_weighted_adapter; combine their mean/ adapters.")

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> Any:
        raise UserError("ScalaBL does not change the base weights, so there is no initial adapter to subtract.")


