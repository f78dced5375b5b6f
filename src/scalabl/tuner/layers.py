"""Which layers of a model are adapted, which of them are stochastic, and how deep they lie.

Of an image-text model the language side alone is adapted by default, and its decoder layers are the ones counted.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalabl.core.errors import UserError
from scalabl.core.modules import base_name, split_leaf
from scalabl.posterior.gaussian import Prior
from scalabl.tuner.projection import StochasticProjection
from scalabl.tuner.threads import alone, base_model


def unwrap(model: nn.Module) -> nn.Module:
    """The PEFT model inside DistributedDataParallel and torch.compile, in any order."""
    while True:
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters in use: what PEFT's model says, or the layers of an adapter that was injected."""
    active: Any = getattr(model, "active_adapters", None)
    if active is None:
        active = getattr(model, "active_adapter", None)
    if active is None or callable(active):  # transformers' method knows only what its own integration has loaded
        found = (name for layer in model.modules() if isinstance(layer, LoraLayer) for name in layer.active_adapters)
        active = list(dict.fromkeys(found)) or "default"
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


def require_live(model: nn.Module) -> None:
    """Refuse a model whose adapted layers take no part in a forward pass: a draw or a gradient would change nothing.

    Raises:
        UserError: an active adapter is merged into its base, or adapters are disabled.
    """
    for layer in unwrap(model).modules():
        if isinstance(layer, LoraLayer) and layer.merged:
            raise UserError(
                "The adapter is merged into its base, so that nothing can be drawn or trained; call unmerge_adapter() "
                "first."
            )
        if isinstance(layer, LoraLayer) and layer.disable_adapters:
            raise UserError("The adapter is disabled, so that nothing can be drawn or trained; enable it first.")


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit layers from being packed for prediction by their first pass on a CPU with AVX-512 BF16.

    bitsandbytes never unpacks them for a later training pass, and a packed product has no gradient: what lies below
    would silently be trained on a part of it, and the linearised predictive would find none.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def kl_divergence(model: nn.Module, adapter: str | None = None) -> Tensor:
    """KL(q || p) in nats, summed over all stochastic layers of the (active) adapter: a differentiable scalar.

    Where several adapters are active, each has its own prior.

    Raises:
        UserError: the model has no stochastic layer, or its adapter is merged into the base.
    """
    require_live(model)
    terms = [leaf.posterior.kl(prior_of(model, name)) for _, name, leaf in _leaves(model, adapter)]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _leaves(model: nn.Module, adapter: str | None) -> list[tuple[str, str, StochasticProjection]]:
    """(name of the adapted layer in the base model, name of the adapter, leaf) of an adapter or of the active ones."""
    model = unwrap(model)
    wanted = [adapter] if adapter is not None else active_adapters(model)
    leaves = []
    with alone(model):  # while another thread predicts, layers may have stand-ins
        for name, module in model.named_modules():
            if isinstance(module, StochasticProjection):
                layer, adapter_name = split_leaf(name)
                if adapter_name in wanted:
                    leaves.append((layer, adapter_name, module))
    if not leaves:
        raise UserError(
            f"No stochastic layer in adapter {', '.join(wanted)}: make the adapter with scalabl.ScalaBLConfig, "
            "a plain LoraConfig has no posterior."
        )
    return leaves


def reads_images(model: nn.Module) -> bool:
    """Whether a model has an image side beside its language side."""
    return getattr(getattr(unwrap(model), "config", None), "vision_config", None) is not None


def language_side(model: nn.Module) -> nn.Module:
    """The decoder of an image-text model; any other model as it is."""
    if not reads_images(model):
        return model
    base: Any = base_model(model)
    side: nn.Module = base.get_decoder()
    return side


def beside_language(model: nn.Module) -> str | None:
    """A regular expression of the modules that are neither the language side nor the output layer; None for a model
    without an image side.

    PEFT's `exclude_modules`: a target named by the end of its path (q_proj) is in many image towers too.
    """
    if not reads_images(model):
        return None
    base: Any = base_model(model)
    kept = [base_name(name) for name, module in base.named_modules() if module is base.get_decoder()]
    kept += [base_name(name) for name, module in base.named_modules() if module is base.get_output_embeddings()]
    names = "|".join(re.escape(name) for name in kept)
    return rf"(?!(?:{names})(?:\.|$)).*"


def sequence_classifier(model: nn.Module) -> PreTrainedModel | None:
    """The model that ends in a classification head (Transformers' ...ForSequenceClassification); None for others."""
    base: Any = base_model(model)
    return base if type(base).__name__.endswith("ForSequenceClassification") else None


def reads_token_types(model: nn.Module) -> bool:
    """Whether a sequence classifier has embeddings of which text of a pair a token is of."""
    base = sequence_classifier(model)
    named = base is not None and "token_type_ids" in inspect.signature(base.forward).parameters
    return named and getattr(base.config, "type_vocab_size", 0) > 1  # type: ignore[union-attr]


def learnt_positions(model: nn.Module) -> int | None:
    """The longest row in tokens that a model has learnt positions for; None where positions are not embeddings."""
    base: Any = base_model(model)
    config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
    room = getattr(config, "max_position_embeddings", None)
    for name, module in language_side(base).named_modules():  # an image side has positions of its own
        last = name.rpartition(".")[2]
        if room is not None and isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            # RoBERTa's positions are counted from behind that of the padding; some have a few rows more than positions
            begin = 0 if module.padding_idx is None else module.padding_idx + 1
            return int(min(room, module.num_embeddings - begin))
    return None


def position_projections(model: nn.Module) -> tuple[str, ...]:
    """The modules, by the ends of their names, that a model applies to embeddings of positions, which have no rows: an
    adapter there is plain LoRA. DeBERTa's relative positions go through its projections [He et al. 2021, eq. 4]."""
    config: Any = getattr(unwrap(model), "config", None)
    if getattr(config, "model_type", None) not in ("deberta", "deberta-v2") or not config.relative_attention:
        return ()
    if getattr(config, "share_att_key", False):
        return "query_proj", "key_proj"
    return "pos_query_proj", "pos_key_proj", "pos_proj", "pos_q_proj"


def without_rows(model: nn.Module) -> Callable[[str], bool]:
    """Whether an adapter on the module of a name is plain LoRA, because a draw there could not belong to the tokens
    of a row: projections of positions, and what stands behind a classifier's body, which sees one pooled feature."""
    base = base_model(model)
    ends, head = position_projections(base), set(head_modules(base))

    def is_without(name: str) -> bool:
        name = base_name(name)
        return any(name == end or name.endswith(f".{end}") for end in ends) or not head.isdisjoint(name.split(".")[:2])

    return is_without


def head_modules(model: nn.Module) -> list[str]:
    """The modules of a sequence classifier that are trained whole beside an adapter: all that stands behind its body,
    and the body's pooler, whose weights many checkpoints lack."""
    base = sequence_classifier(model)
    if base is None:
        return []
    names = [name for name, module in base.named_children() if any(True for _ in module.parameters())]
    pooler = ["pooler"] if getattr(base.base_model, "pooler", None) is not None else []
    return pooler + [name for name in names if name != base.base_model_prefix]


def head_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `head_modules` by their whole names in the base model."""
    base = sequence_classifier(model)
    if base is None:
        return {}
    names = head_modules(model)
    inside = [module for name, module in base.base_model.named_children() if name in names]
    parts = [module for name, module in base.named_children() if name in names] + inside
    return {name: module for name, module in base.named_modules() if any(module is part for part in parts)}


def beside_layers(model: nn.Module) -> str:
    """A regular expression of the modules that stand in no layer: embeddings, poolers, heads."""
    base = unwrap(model)
    layers = decoder_layers(base)
    inside = next(base_name(name) for name, module in base.named_modules() if module is layers)
    return rf"(?!{re.escape(inside)}\.).*"


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's list of decoder (or encoder) layers: its (language side's) longest ModuleList of like modules, or of
    as many as the configuration has layers, where these are of several kinds (attention and state spaces); the
    decoder's where it has both.

    Raises:
        UserError: there is none.
    """
    return _layers_of(_stacks(model)[-1])


def _stacks(model: nn.Module) -> list[nn.Module]:
    """What holds the layers, in the order of a pass: encoder and decoder, or a language model alone."""
    base: Any = base_model(model)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return [base.get_encoder(), base.get_decoder()]
    return [language_side(model)]


def _layers_of(stack: nn.Module) -> nn.ModuleList:
    lists = [m for m in stack.modules() if isinstance(m, nn.ModuleList) and len(m)]
    number = getattr(getattr(unwrap(stack), "config", None), "num_hidden_layers", None)
    lists = [m for m in lists if len({type(x) for x in m}) == 1 or len(m) == number]
    if not lists:
        raise UserError("This model has no list of decoder layers, so nothing can be told about their depth.")
    most = max(map(len, lists))
    longest = [m for m in lists if len(m) == most]
    return longest[0] if len(longest) == 1 else max(longest, key=lambda m: sum(p.numel() for p in m.parameters()))


def depths(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Name of a module -> the number of its decoder layer; their count for what follows them (lm_head), 0 for an
    embedding, which comes before. An encoder's layers are counted first.

    Args:
        model: a model, with an adapter or without.
        names: of modules, in the base model or in the one with the adapter.
    """
    model = unwrap(model)
    stacks = [_layers_of(stack) for stack in _stacks(model)]
    begins, count = {}, 0
    for layers in stacks:
        begins[base_name(next(name for name, module in model.named_modules() if module is layers))] = count
        count += len(layers)
    inside = re.compile(rf"({'|'.join(map(re.escape, begins))})\.(\d+)(\.|$)")

    def depth(name: str) -> int:
        if match := inside.match(base_name(name)):
            return begins[match[1]] + int(match[2])
        return 0 if "embed" in name else count

    return {name: depth(name) for name in names}
