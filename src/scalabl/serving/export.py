"""`scalabl export`: N particles of a run as N plain LoRAs, A_k = diag(s_k) A, from the run's files alone.

The noise is keyed by seed and layer name, both of which the files have. Sobol draws also depend on the layers' order in
the model, which the base model's configuration tells.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from scalabl.core import __version__
from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, sha256, write_json, writing
from scalabl.core.remote_code import trust_remote_code
from scalabl.posterior.draws import noise
from scalabl.runs.directory import reading_config
from scalabl.runs.models import saved_tokenizer
from scalabl.runs.record import RunRecord
from scalabl.serving.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PARTICLES,
    TOKENIZER,
    Identity,
    ParticleManifest,
    limits_of,
    particles_temperature,
    prepare,
    read_manifest,
)
from scalabl.tuner.config import ScalaBLConfig
from scalabl.tuner.joint import load_joint
from scalabl.tuner.mean_adapter import fold, stored_leaves, write_plain_adapter

_OUTPUT_LAYERS = ("lm_head", "embed_out")
_RECIPE = (
    "method", "data", "r", "lora_alpha", "target_modules", "layers", "covariance", "prior_mean", "prior_std",
    "empirical_prior", "stochastic_modules", "stochastic_layers", "steps", "seed", "dtype", "bits",
)  # fmt: skip


def export(
    directory: Path,
    number: int,
    output: Path | None = None,
    *,
    seed: int = 0,
    draws: str = "independent",
    name: str = "particle",
    raw: bool = False,
) -> ParticleManifest:
    """Write OUT/particles/0 .. N-1 and OUT/particles/manifest.json; they appear together or not at all.

    Particle k is particle k of `scalabl.particles(model, N, seed=seed, scale=tau)`, tau that of the run's calibration:
    its rank patterns and scaling are the run's, its A is diag(s_k) A. What PEFT copies of the frozen embeddings into
    the adapter of an output layer is left out.

    Args:
        directory: an adapter with a posterior: of `scalabl train`, `scalabl bayesianize`, or any trainer's
            `save_pretrained`.
        number: N, at least 1.
        output: OUT, the run's own directory by default.
        seed: of the draws.
        draws: their kind (`scalabl.predictive.sampling.DRAWS`).
        name: the particles will be served as NAME-0 .. NAME-(N-1).
        raw: leave the run's own calibration out.

    Returns:
        the manifest; of what is there already where it is the same export.

    Raises:
        UserError: a plain or an unfinished run, altered files, a bad setting, another export in OUT, or no place to
            write.
    """
    output = output or directory
    identity, content, record = prepare(directory, number, output, seed=seed, draws=draws, name=name, raw=raw)
    target = output / PARTICLES
    if target.exists():
        return read_manifest(output)
    with reading_config(directory):
        config = ScalaBLConfig.from_pretrained(str(directory))
    assert isinstance(config, ScalaBLConfig)
    try:
        tensors = load_file(directory / ADAPTER)
        # PEFT copies frozen weights of the base model beside the adapter of an output layer: gigabytes a particle
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".base_layer.weight")}
        values = particle_values(directory, tensors, config, number, seed=seed, draws=draws, scale=identity.scale)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{directory / ADAPTER} is truncated or altered ({error}); restore the file.") from error

    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UserError(
            f"{directory / ADAPTER} has weights that are no numbers (NaN or infinite); train the run again."
        )
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with writing(target) as unfinished, progress_bar() as progress:
            bar = progress.add_task("exporting", total=number, detail="")
            digests = []
            for k in range(number):
                plain = fold(tensors, config.unit_rows, lambda prefix, _mean, k=k: values[prefix][k])  # type: ignore[misc]
                write_plain_adapter(unfinished / str(k), plain, config)
                digests.append(sha256(unfinished / str(k) / ADAPTER))
                progress.advance(bar)
            tempered = particles_temperature(directory, record, identity, raw)
            manifest = _manifest(identity, content, record, name, tensors, tuple(digests), *tempered)
            write_json(unfinished / MANIFEST, manifest.as_dict())
            tokenizer = saved_tokenizer(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(unfinished / TOKENIZER))
    except BaseException:
        if made and not any(output.iterdir()):
            output.rmdir()
        raise
    return manifest


def _manifest(
    identity: Identity,
    config: dict[str, Any],
    record: RunRecord | None,
    name: str,
    tensors: dict[str, Tensor],
    digests: tuple[str, ...],
    temperature: float | None,
    calibrated: bool,
) -> ParticleManifest:
    targets = config["target_modules"]
    output_layer = any(f".{layer}.lora_A." in key for key in tensors for layer in _OUTPUT_LAYERS)
    labels = record.labels if record else None
    head = _head_labels(tensors) if config.get("task_type") == "SEQ_CLS" else None
    rank = max(tensor.shape[1] for key, tensor in tensors.items() if ".lora_B." in key)
    return ParticleManifest(
        format_version=FORMAT_VERSION,
        scalabl=__version__,
        format="peft",
        identity=identity,
        sha256=digests,
        name=name,
        base_model=config.get("base_model_name_or_path"),
        base_fingerprint=config.get("base_fingerprint"),
        rank=rank,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        adapts_output_layer=output_layer,
        dtype=_dtype(record),
        recipe={key: record.recipe.get(key) for key in _RECIPE} if record else None,
        scoring=record.scoring if record else None,
        temperature=temperature,
        calibrated=calibrated,
        head=config.get("task_type") == "SEQ_CLS",
        labels=labels or None,
        head_labels=head,
        warnings=limits_of(config, record, rank, output_layer, head, calibrated),
    )


def _head_labels(tensors: Mapping[str, Tensor]) -> int | None:
    """Outputs of a decoder's head, the linear layer `score` on top; None where more or something else is trained whole.

    Args:
        tensors: the contents of the adapter's file.
    """
    whole = {
        key: tensor for key, tensor in tensors.items() if key.endswith((".weight", ".bias")) and ".lora_" not in key
    }
    score = {key: tensor for key, tensor in whole.items() if key.rpartition(".")[0] == "base_model.model.score"}
    weight = score.get("base_model.model.score.weight")
    return None if weight is None or len(score) < len(whole) else weight.shape[0]


def _dtype(record: RunRecord | None) -> str | None:
    """The precision of the base model in training, as `load_base` chose it."""
    if record is None:
        return None
    dtype: str = record.recipe["dtype"]
    if dtype == "auto":
        return "float32" if record.device.startswith("cpu") else "bfloat16"
    return dtype


def particle_values(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: ScalaBLConfig,
    number: int,
    *,
    seed: int,
    draws: str,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """s of N particles in every stochastic layer.

    Args:
        directory: the adapter's; its covariance between layers is used where it lies there.
        tensors: the contents of its `adapter_model.safetensors`.
        config: its configuration.
        number: N.
        seed: of the draws.
        draws: their kind (`scalabl.posterior.draws`).
        scale: tau, as in `scalabl.particles`.

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
        return {leaf.prefix: leaf.posterior.sample(scale * drawn[layer]) for layer, leaf in leaves.items()}


def _model_order(config: ScalaBLConfig, layers: Collection[str]) -> list[str]:
    """The layers as they stand in the model, which is built without weights."""
    name = config.base_model_name_or_path or "(not named)"
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code())
    except (OSError, ValueError) as error:
        raise UserError(
            f"Sobol draws depend on the order of the layers, and the configuration of the base model {name} cannot be "
            "read; put it where the adapter says, or choose other --draws."
        ) from error
    found = [module for module, _ in model.named_modules() if module in layers]
    if len(found) != len(layers):
        raise UserError(f"The base model {name} lacks layers that the adapter was made for; choose other --draws.")
    return found
