"""ScalaBLModel: PEFT's LoraModel whose every A is a stochastic leaf, on the base model that it was made for.

A base model has a fingerprint, a short name equal across precisions, so that an adapter is never put on another one.
"""

from __future__ import annotations

import copy
import hashlib
import re
import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalabl.core.errors import UserError
from scalabl.core.modules import gathered, top_layers
from scalabl.tuner.config import ScalaBLConfig
from scalabl.tuner.diagnostics import NARROW
from scalabl.tuner.layers import beside_language, depths, keep_differentiable, without_rows
from scalabl.tuner.mean_adapter import MEAN_DIRECTORY
from scalabl.tuner.projection import Particles, StochasticProjection

# parts of the names of what adapters add; a trained copy of a normalisation layer (modules_to_save) is no base weight
_ADDED = ("lora_", "modules_to_save")
# their attention transposes what it is given: (tokens, rows, features)
_POSITIONS_FIRST = ("xlnet", "longformer", "led", "fsmt")
_FAR = 5  # so many prior standard deviations off, s does not begin where the prior is
_SIZES = ("model_type", "hidden_size", "num_hidden_layers")


class ScalaBLModel(LoraModel):
    """LoRA's own layers, with `lora_A[adapter]` swapped for a `StochasticProjection`.

    Everything that PEFT does with a LoRA layer (quantised bases, merging, several adapters, disabling) stays
    PEFT's; the noise lives in the leaf alone.

    Raises:
        UserError: no module matches, a target is not a linear layer, r exceeds a layer, there are fewer layers than
            are to be stochastic, or the adapter was made for another base model.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        _refuse_name(adapter_name)
        if any(isinstance(m, StochasticProjection) and isinstance(m.state, Particles) for m in model.modules()):
            raise UserError(f"The adapter {adapter_name} cannot be added among another one's particles; add it before.")
        if getattr(getattr(model, "config", None), "model_type", None) in _POSITIONS_FIRST:
            raise UserError(
                f"A {model.config.model_type} model lays positions before rows, so that a draw of s would belong to a "  # type: ignore[union-attr]
                "position; choose a model whose layers see (rows, tokens, features)."
            )
        # a copy, so that one configuration object can serve several base models
        config = cast(ScalaBLConfig, copy.copy(self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        self._stochastic: set[str] | None = None
        # by the end of its path a target may be in an image tower too; a regular expression says what it means
        if config.exclude_modules is None and (
            config.target_modules == "all-linear" or not isinstance(config.target_modules, str)
        ):
            config.exclude_modules = beside_language(model)
        # a saved adapter is loaded as it is; the names that PEFT chooses itself are of a family of models
        is_new = config.base_fingerprint is None
        named = config.target_modules if is_new else None
        if config.base_fingerprint is None:
            config.base_fingerprint = fingerprint(model)
        elif not is_base(model, config.base_fingerprint):
            raise UserError(
                "This adapter was trained on another base model (its fingerprint is "
                f"{config.base_fingerprint}, this model's is {fingerprint(model)}); load the base model named in "
                f"adapter_config.json ({config.base_model_name_or_path})."
            )
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            # what `exclude_modules` or `layers_to_transform` leave out of a name's modules is the user's choice
            beside = re.compile(beside_language(model) or r"(?!)")
            names = [n for n, _ in model.named_modules() if "lora_" not in n and not beside.fullmatch(n)]
            _refuse_unmatched("target_modules", named, names, model)
            _refuse_whole(named, config.modules_to_save or (), names)
            names = [n for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]
            _refuse_unmatched("stochastic_modules", getattr(config, "stochastic_modules", None), names, model)
        except NoMatchingPeftModuleError as error:
            raise UserError(
                f"target_modules={_as_text(config.target_modules)} adapts no layer of this model; name layers by the "
                f"end of their path, of which it has {_linear_names(model)}."
            ) from error
        except UserError:
            self._take_out(adapter_name)
            raise
        keep_differentiable(model)
        if is_new and isinstance(config, ScalaBLConfig):
            _warn_of_a_far_prior(model, adapter_name, config)

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: ScalaBLConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("parameter_name") is not None:
            raise UserError(
                f"ScalaBL adapts linear layers, but {current_key} is a parameter (of expert layers, for instance); "
                "remove it from the targets."
            )
        base = target.get_base_layer() if isinstance(target, LoraLayer) else target
        if isinstance(base, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.MultiheadAttention):
            raise UserError(
                f"ScalaBL adapts linear layers, but {current_key} is a {type(base).__name__}; remove it from "
                "target_modules."
            )
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if not self._is_stochastic(lora_config, current_key):
            return
        layer = getattr(parent, target_name)
        plain = layer.lora_A[adapter_name]
        if not isinstance(plain, nn.Linear):
            raise UserError(
                f"ScalaBL cannot adapt {current_key}, a {type(base).__name__}; remove it from target_modules."
            )
        r, smallest = plain.out_features, min(layer.in_features, layer.out_features)
        if r > smallest:
            raise UserError(
                f"r is {r}, but {current_key} has only {smallest} dimensions; lower r, or give this layer its own "
                "rank in rank_pattern."
            )
        leaf = self._leaf(plain.weight, lora_config)
        layer.lora_A[adapter_name] = leaf.requires_grad_(plain.weight.requires_grad)
        # PEFT's own modules begin in training mode, in which a leaf draws, whatever mode the model is in
        layer.train(base.training)

    def _is_stochastic(self, config: ScalaBLConfig, name: str) -> bool:
        """Whether s is uncertain in the adapted module of this name."""
        ends, layers = getattr(config, "stochastic_modules", None), getattr(config, "stochastic_layers", None)

        def is_named(module: str) -> bool:
            return ends is None or any(_ends_in(module, end) for end in ends)

        if without_rows(self.model)(name):
            if ends is not None and is_named(name):
                raise UserError(
                    f"stochastic_modules names {name.rpartition('.')[2]}, which this model also applies to what is no "
                    "row of tokens (positions that all rows share, pooled features), so that no row can have a draw "
                    "of its own; leave it out."
                )
            return False
        if layers is None:
            return is_named(name)
        if self._stochastic is None:  # at the first of the modules: which will there be?
            no_rows = without_rows(self.model)  # in which there is no s that could be a layer of the last K
            keys = [key for key, _ in self.model.named_modules() if self._check_target_module_exists(config, key)]
            able = [key for key in keys if is_named(key) and not no_rows(key)]
            self._stochastic = set(top_layers(depths(self.model, able), layers))
        return name in self._stochastic

    def _leaf(self, weight: Tensor, config: ScalaBLConfig) -> nn.Module:
        """What takes the place of LoRA's A, from LoRA's own draw of it (r, d_in)."""
        return StochasticProjection(
            weight,
            covariance=config.covariance,
            init_sigma=config.init_sigma,
            unit_rows=config.unit_rows,
            draws=config.draws,
        )

    def _take_out(self, adapter_name: str) -> None:
        """Leave the model as it was before a refusal in the middle of the layers."""
        if len(self.peft_config) == 1:
            self.unload()
        else:
            self.delete_adapter(adapter_name)

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

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's batches of mixed adapters regroup the rows, so that row j would no longer carry particle j // B."""
        if kwargs.get("adapter_names") is not None and any(
            isinstance(module, StochasticProjection) and isinstance(module.state, Particles)
            for module in self.modules()
        ):
            raise UserError("adapter_names cannot be given under particles; predict with one adapter after the other.")
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        """Before a merge: an adapted output layer that shares the input embedding's weights gets a copy of its own.

        PEFT adds the adapter to the shared tensor in place, which would change the input embeddings too.
        """
        embedding = self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer) and embedding is not None and layer.get_base_layer() is not embedding:
                base = layer.get_base_layer()
                if base.weight is getattr(embedding, "weight", None):
                    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True", category=UserWarning)
            super()._check_merge_allowed()


def fingerprint(model: nn.Module) -> str | None:
    """Identity of the model's architecture and of its first and last normalisation weights; None on a meta device.

    The vocabulary is no part of it: embeddings are resized for added tokens.

    Normalisation weights are never quantised and differ between almost any two trained models; they are compared in
    bfloat16, so that the same model in float32, bfloat16 or 4 bit has one fingerprint of 16 hex digits. A float32
    model has a second one, after a colon: its own after rounding to float16, should it be loaded in that precision.
    Two bases that differ in frozen layers alone (a merged LoRA of attention layers) look the same.
    """
    names = _names(model, _SIZES)
    return ":".join(names) if names else None


def is_base(model: nn.Module, trained: str) -> bool:
    """Whether an adapter with the fingerprint `trained` can be this model's, each in a precision of its own.

    Older fingerprints hold the size of the vocabulary too. A model on a meta device can be any base.
    """
    names = _names(model, _SIZES)
    return not names or not {*names, *_names(model, (*_SIZES, "vocab_size"))}.isdisjoint(trained.split(":"))


def _names(model: nn.Module, sizes: tuple[str, ...]) -> list[str]:
    norms = [
        parameter
        for name, parameter in model.named_parameters()
        if ("norm" in name.lower() or "ln_" in name.lower()) and not any(part in name for part in _ADDED)
    ]
    if not norms or norms[0].is_meta or norms[-1].is_meta:
        return []
    config = getattr(model, "config", None)
    of_config = [f"{key}={getattr(config, key, None)};" for key in sizes]
    # the first and the last: a base that was tuned further differs in at least one of them
    values = [gathered(parameter.detach()).to("cpu") for parameter in (norms[0], norms[-1])]
    names = [_digest(of_config, values), _digest(of_config, [value.to(torch.float16) for value in values])]
    return list(dict.fromkeys(names))


def _digest(sizes: list[str], values: list[Tensor]) -> str:
    digest = hashlib.sha256("".join(sizes).encode())
    for value in values:
        digest.update(value.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _refuse_unmatched(option: str, ends: Any, modules: list[str], model: nn.Module) -> None:
    """Refuse a name in a list that no module ends in: what it means would silently be left as it is.

    Raises:
        UserError: there is one.
    """
    if ends is None or isinstance(ends, str):
        return
    for end in sorted(ends):
        if any(_ends_in(name, end) for name in modules):
            continue
        if any(_ends_in(name, end) for name, _ in model.named_parameters()):
            raise UserError(
                f"ScalaBL adapts linear layers, but {end} is a parameter (of expert layers, for instance); remove it "
                f"from {option}."
            )
        there = set(_linear(model)) & set(modules)
        raise UserError(
            f"{option} names {end}, but no {'adapted' if option == 'stochastic_modules' else 'linear'} module ends in "
            f"it; name some of {', '.join(sorted({name.rpartition('.')[2] for name in there}))}."
        )


def _refuse_whole(ends: Any, whole: Iterable[str], modules: list[str]) -> None:
    """Refuse a name in a list all of whose modules are trained whole: PEFT adapts none of those.

    Raises:
        UserError: there is one.
    """
    parts = set(whole)
    for end in () if ends is None or isinstance(ends, str) else sorted(ends):
        if all(not parts.isdisjoint(name.split(".")) for name in modules if _ends_in(name, end)):
            raise UserError(
                f"target_modules names {end}, which is trained whole (modules_to_save) and gets no adapter; leave it "
                "out of one of the two."
            )


def _warn_of_a_far_prior(model: nn.Module, adapter_name: str, config: ScalaBLConfig) -> None:
    """Say so where s begins far from its prior, as under init_lora_weights="gaussian": the KL would undo the draw."""
    leaves = [m.lora_A[adapter_name] for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]
    means = [leaf.posterior.mean.detach().float() for leaf in leaves if isinstance(leaf, StochasticProjection)]
    if not means or means[0].device.type == "meta" or config.empirical_prior:
        return
    start = torch.cat(means).mean().item()
    off = abs(start - config.prior_mean) / config.prior_std
    if off > _FAR:
        warnings.warn(
            f"s begins near {start:.3g}, which is {off:.0f} standard deviations from its prior "
            f"N({config.prior_mean:g}, {config.prior_std:g}^2), so that the KL would undo LoRA's draw; give "
            f"prior_mean={start:.3g} and prior_std={NARROW * abs(start):.2g}.",
            stacklevel=2,
        )


def _refuse_name(adapter_name: str) -> None:
    """Refuse an adapter whose name stands for something else where it is saved or looked up.

    Raises:
        UserError: there is no such name for an adapter.
    """
    if adapter_name == MEAN_DIRECTORY:
        raise UserError(
            f"An adapter cannot be named {MEAN_DIRECTORY}: it would be saved in {MEAN_DIRECTORY}/, where another one's "
            "plain LoRA lies; give it another name."
        )
    if not adapter_name or "." in adapter_name or adapter_name == "posterior":
        raise UserError(
            f"An adapter cannot be named {adapter_name!r}: its name is a part of its parameters' names, which are "
            'separated by dots and have a "posterior"; give it another name.'
        )


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _as_text(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) or targets is None else repr(sorted(targets))


def _linear_names(model: nn.Module) -> str:
    """The distinct last parts of the names of the model's linear layers."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in _linear(model)})) or "none"


def _linear(model: nn.Module) -> list[str]:
    """The names of the linear layers in the model without its adapters."""
    kinds = nn.Linear | Conv1D
    layers = [(name, module) for name, module in model.named_modules() if "lora_" not in name]
    layers = [(n, m.get_base_layer() if isinstance(m, LoraLayer) else m) for n, m in layers]
    return [name for name, module in layers if isinstance(module, kinds) and not name.endswith(".base_layer")]
