"""An adapter directory read without its base model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scalabl.errors import UserError
from scalabl.run_directory import ADAPTER

CONFIG = "adapter_config.json"


def require_adapter(directory: Path) -> dict[str, Any]:
    """The adapter's configuration as JSON; imports no torch.

    Raises:
        UserError: there is no adapter in the directory, or its configuration cannot be read.
    """
    for name in (CONFIG, ADAPTER):
        if not (directory / name).is_file():
            raise UserError(f"{directory} holds no {name}; give a directory made by scalabl train or save_pretrained.")
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{directory / CONFIG} is not readable JSON; restore the file.") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise UserError(f"{directory / CONFIG} is no adapter's configuration; restore the file.")
    return config


def describe_adapter(directory: Path) -> dict[str, Any]:
    """What `scalabl inspect` shows.

    Returns:
        base_model, target_modules, r, lora_alpha, covariance, prior, lora_parameters, variational_parameters, kl,
        layers (name, r, mean, sigma, noise, kl, effect; None where there is no posterior), warnings.

    Raises:
        UserError: missing, truncated or altered files.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from scalabl.diagnostics import LayerWeights, summarize, warnings_of
    from scalabl.posterior import POSTERIORS, Prior
    from scalabl.tuner.mean_adapter import projection_rows

    config = require_adapter(directory)
    try:
        tensors = load_file(directory / ADAPTER)
    except SafetensorError as error:
        raise UserError(f"{directory / ADAPTER} is truncated or altered ({error}); restore the file.") from error
    bayesian = config["peft_type"] == "SCALABL"
    weights, plain = [], []
    for name, direction in tensors.items():
        layer, _, rest = name.partition(".lora_A.")
        layer_name = layer.removeprefix("base_model.model.")
        if rest == "weight":
            plain.append({"name": layer_name, "r": direction.shape[0]})
        if rest != "direction":
            continue
        log_mean = tensors[f"{layer}.lora_A.posterior.log_mean"]
        posterior = POSTERIORS[config["covariance"]](torch.ones_like(log_mean), torch.ones_like(log_mean))
        prefix = f"{layer}.lora_A.posterior."
        posterior.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        r = direction.shape[0]
        alpha = next((v for k, v in config["alpha_pattern"].items() if k in layer_name), config["lora_alpha"])
        weights.append(
            LayerWeights(
                layer_name,
                posterior,
                projection_rows(direction, config["unit_rows"]),
                tensors[f"{layer}.lora_B.weight"],
                alpha / (r**0.5 if config["use_rslora"] else r),
            )
        )
    prior = Prior(config["prior_mean"], config["prior_std"]) if bayesian else Prior()
    summaries = summarize(weights, prior)
    variational = sum(t.numel() for n, t in tensors.items() if ".posterior." in n)
    empty = {"mean": None, "sigma": None, "noise": None, "kl": None, "effect": None}
    return {
        "base_model": config.get("base_model_name_or_path"),
        "target_modules": ", ".join(sorted(config.get("target_modules") or [])),
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "covariance": config.get("covariance"),
        "prior": f"N({prior.mean}, {prior.std}^2)" if bayesian else None,
        "lora_parameters": sum(t.numel() for t in tensors.values()) - variational,
        "variational_parameters": variational,
        "kl": sum(s.kl for s in summaries) if bayesian else None,
        "layers": [asdict(s) for s in summaries] or [row | empty for row in plain],
        "warnings": warnings_of(summaries, prior) if bayesian else ["a plain LoRA: it has no posterior"],
    }
