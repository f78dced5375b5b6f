"""BLoBModel: PEFT's LoraModel whose every A is a `BLoBProjection`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scalabl.errors import UserError
from scalabl.tuner.layers import active_adapters, unwrap
from scalabl.tuner.model import ScalaBLModel
from scalabl.tuner_blob.projection import BLoBProjection


class BLoBModel(ScalaBLModel):
    """The leaf swap, the refusals and the base model's fingerprint are the ScalaBL tuner's; the leaf is BLoB's."""

    def _leaf(self, weight: Tensor, config: Any) -> nn.Module:
        return BLoBProjection(weight, eps=config.init_eps)


def blob_layers(model: nn.Module) -> dict[str, BLoBProjection]:
    """The BLoB leaves of the active adapter by the name of the layer they adapt.

    Raises:
        UserError: there is none.
    """
    model = unwrap(model)
    adapter = active_adapters(model)[0]
    found = {}
    for name, module in model.named_modules():
        layer, _, of = name.removeprefix("base_model.model.").partition(".lora_A.")
        if isinstance(module, BLoBProjection) and of == adapter:
            found[layer] = module
    if not found:
        raise UserError("The model has no BLoB layer: make the adapter with BLoBConfig, or train with --method blob.")
    return found
