"""The stochastic layers of a model, by name, and sums over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scalabl.errors import UserError
from scalabl.posterior import Prior
from scalabl.tuner.projection import StochasticProjection

# what torch.compile, FSDP and checkpointing wrappers put into the names of the modules inside them
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrap(model: nn.Module) -> nn.Module:
    """The PEFT model inside DistributedDataParallel and torch.compile, in any order."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters in use."""
    active: Any = getattr(model, "active_adapters", None)
    if callable(active):  # transformers' own integration has a method of this name
        active = active()
    if active is None:
        active = getattr(model, "active_adapter", "default")
    return [active] if isinstance(active, str) else list(active)


def stochastic_layers(model: nn.Module, adapter: str | None = None) -> dict[str, StochasticProjection]:
    """The stochastic leaves of an adapter by the name of the layer they adapt ("model.layers.3.self_attn.q_proj").

    Where several adapters are active, the adapter's name follows ("model.layers.3.self_attn.q_proj.first").

    Args:
        model: a PEFT model, wrapped (DDP, compiled) or not.
        adapter: its name; the active ones if None.

    Raises:
        UserError: there is none, so the model would silently be a plain LoRA.
    """
    leaves = _leaves(model, adapter)
    several = len({name for _, name, _ in leaves}) > 1
    return {f"{layer}.{name}" if several else layer: leaf for layer, name, leaf in leaves}


def prior_of(model: nn.Module, adapter: str | None = None) -> Prior:
    """The prior that the adapter was configured with; the first active one's if `adapter` is None."""
    model = unwrap(model)
    name = adapter if adapter is not None else active_adapters(model)[0]
    prior = model.peft_config[name].prior  # type: ignore[index, union-attr]
    assert isinstance(prior, Prior)
    return prior


def kl_divergence(model: nn.Module, adapter: str | None = None) -> Tensor:
    """KL(q || p) in nats, summed over all stochastic layers of the (active) adapter: a differentiable scalar.

    Where several adapters are active, each is held against its own prior.

    Raises:
        UserError: the model has no stochastic layer.
    """
    terms = [leaf.posterior.kl(prior_of(model, name)) for _, name, leaf in _leaves(model, adapter)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _leaves(model: nn.Module, adapter: str | None) -> list[tuple[str, str, StochasticProjection]]:
    """(name of the adapted layer in the base model, name of the adapter, leaf) of an adapter or of the active ones."""
    model = unwrap(model)
    wanted = [adapter] if adapter is not None else active_adapters(model)
    leaves = []
    for name, module in model.named_modules():
        if isinstance(module, StochasticProjection):
            layer, _, adapter_name = bare(name).partition(".lora_A.")
            if adapter_name in wanted:
                leaves.append((layer, adapter_name, module))
    if not leaves:
        raise UserError(
            f"No stochastic layer in adapter {', '.join(wanted)}: make the adapter with scalabl.ScalaBLConfig, "
            "a plain LoraConfig has no posterior."
        )
    return leaves


def bare(name: str) -> str:
    """The name in the base model, without what wrappers put in front or between."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.model.")
