"""An adapter directory read without its base model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, read_json
from scalabl.core.modules import split_leaf

if TYPE_CHECKING:
    from torch import Tensor

    from scalabl.posterior.prior import Prior
    from scalabl.tuner.diagnostics import LayerWeights


CONFIG = "adapter_config.json"


def require_adapter(directory: Path) -> dict[str, Any]:
    """The adapter's configuration as JSON; imports no torch.

    Raises:
        UserError: there is no adapter in the directory, or its configuration cannot be read.
    """
    path, missing = directory / CONFIG, "{} holds no {}; give a directory made by scalabl train or save_pretrained."
    config = read_json(
        path,
        missing=missing.format(directory, CONFIG),
        mend="restore the file",
        expected="an adapter's configuration; restore the file",
    )
    if not (directory / ADAPTER).is_file():
        raise UserError(missing.format(directory, ADAPTER))
    if config.get("peft_type") not in ("SCALABL", "LORA"):
        raise UserError(f"{path} is not the configuration of a ScalaBL or LoRA adapter.")
    return config


def describe_adapter(directory: Path) -> dict[str, Any]:
    """What `scalabl inspect` shows.

    Returns:
        base_model, target_modules, stochastic_modules, stochastic_layers (None for all), r, lora_alpha, covariance,
        prior, lora_parameters, variational_parameters, kl, layers (those with a posterior: name, r, mean, sigma, noise,
        prior_std, kl, effect; of a plain LoRA all, with None for what a posterior has), warnings.

    Raises:
        UserError: missing, truncated or altered files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from scalabl.posterior.prior import Prior
    from scalabl.tuner.diagnostics import summarize, warnings_of

    config = require_adapter(directory)
    bayesian = config["peft_type"] == "SCALABL"
    try:
        tensors = load_file(directory / ADAPTER)
        weights = _stochastic_layers(tensors, config) if bayesian else []
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{directory / ADAPTER} is truncated or altered ({error}); restore the file.") from error
    if bayesian and not weights:
        raise UserError(f"{directory / ADAPTER} holds no posterior, it was altered; restore the file.")
    empirical = config.get("empirical_prior", False)
    prior = Prior(config["prior_mean"], config["prior_std"], empirical) if bayesian else Prior()
    summaries = summarize(weights, prior)
    variational = sum(t.numel() for n, t in tensors.items() if ".posterior." in n)
    targets = config.get("target_modules") or []
    return {
        "base_model": config.get("base_model_name_or_path"),
        "target_modules": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
        "stochastic_modules": ", ".join(config.get("stochastic_modules") or ()) or None,
        "stochastic_layers": config.get("stochastic_layers"),
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "covariance": config.get("covariance"),
        "prior": _prior_in_words(prior) if bayesian else None,
        "lora_parameters": sum(t.numel() for t in tensors.values()) - variational,
        "variational_parameters": variational,
        "kl": sum(s.kl for s in summaries) if bayesian else None,
        "layers": [asdict(s) for s in summaries] or _plain_layers(tensors),
        "warnings": warnings_of(summaries) if bayesian else ["a plain LoRA: it has no posterior"],
    }


def _prior_in_words(prior: Prior) -> str:
    if prior.empirical:
        return f"N({prior.mean}, std^2), each layer's std from its posterior (empirical Bayes)"
    return f"N({prior.mean}, {prior.std}^2)"


def _stochastic_layers(tensors: dict[str, Tensor], config: dict[str, Any]) -> list[LayerWeights]:
    from peft.utils.other import get_pattern_key

    from scalabl.tuner.diagnostics import LayerWeights
    from scalabl.tuner.mean_adapter import projection_rows, stored_leaves

    found = []
    for name, leaf in stored_leaves(tensors, config["covariance"]).items():
        patterns, r = config["alpha_pattern"], leaf.posterior.r
        alpha = patterns.get(get_pattern_key(patterns, name), config["lora_alpha"])
        rows = projection_rows(leaf.direction, config["unit_rows"])
        scaling = alpha / (r**0.5 if config["use_rslora"] else r)
        found.append(LayerWeights(name, leaf.posterior, rows, leaf.up, scaling))
    return found


def _plain_layers(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    empty = dict.fromkeys(("mean", "sigma", "noise", "prior_std", "kl", "effect"))
    layers = {split_leaf(name)[0]: tensor.shape[0] for name, tensor in tensors.items() if split_leaf(name)[1]}
    return [{"name": layer, "r": r, **empty} for layer, r in layers.items()]
