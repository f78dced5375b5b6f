"""The stochastic layers of a model, by name, and sums over them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalabl.errors import UserError
from scalabl.posterior import Prior
from scalabl.tuner.projection import StochasticProjection


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters in use."""
    active = getattr(model, "active_adapters", None)
    if callable(active):  # transformers' own integration has a method of this name
        active = active()
    if active is None:
        active = getattr(model, "active_adapter", "default")
    return [active] if isinstance(active, str) else list(active)


def stochastic_layers(model: nn.Module, adapter: str | None = None) -> dict[str, StochasticProjection]:
    """The stochastic leaves of an adapter by the name of the layer they adapt ("model.layers.3.self_attn.q_proj").

    Args:
        model: a PEFT model, wrapped (DDP, compiled) or not.
        adapter: its name; the active ones if None.

    Raises:
        UserError: there is none, so the model would silently be a plain LoRA.
    """
    while hasattr(model, "module") and isinstance(model.module, nn.Module):  # DDP
        model = model.module
    model = getattr(model, "_orig_mod", model)  # torch.compile
    wanted = [adapter] if adapter is not None else active_adapters(model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, StochasticProjection):
            layer, _, adapter_name = name.partition(".lora_A.")
            if adapter_name in wanted:
                found[_bare(layer)] = module
    if not found:
        raise UserError(
            f"No stochastic layer in adapter {', '.join(wanted)}: make the adapter with scalabl.ScalaBLConfig, "
            "a plain LoraConfig has no posterior."
        )
    return found


def _bare(name: str) -> str:
    """The name in the base model, without what wrappers put in front or between."""
    name = name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name


def prior_of(model: nn.Module, adapter: str | None = None) -> Prior:
    """The prior that the adapter was configured with; the first active one's if `adapter` is None."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    model = getattr(model, "_orig_mod", model)
    name = adapter if adapter is not None else active_adapters(model)[0]
    prior = model.peft_config[name].prior  # type: ignore[index, union-attr]
    assert isinstance(prior, Prior)
    return prior


def kl_divergence(model: nn.Module, adapter: str | None = None) -> Tensor:
    """KL(q || p) in nats, summed over all stochastic layers of the (active) adapter: a differentiable scalar.

    Raises:
        UserError: the model has no stochastic layer.
    """
    prior = prior_of(model, adapter) if adapter or stochastic_layers(model, adapter) else Prior()
    terms = [leaf.posterior.kl(prior) for leaf in stochastic_layers(model, adapter).values()]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()
