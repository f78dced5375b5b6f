"""`scalabl export`: N particles of a run as N plain LoRAs, A_k = diag(s_k) A, from the run's files alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalabl.core import __version__
from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT, read_json, require_place, sha256, write_json
from scalabl.predictive.sampling import Sampling
from scalabl.runs.adapter_file import require_adapter
from scalabl.runs.record import RECORD, RunRecord
from scalabl.serving.command import limits_of
from scalabl.serving.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    PARTICLES,
    Identity,
    ParticleManifest,
    is_whole,
    particles_directory,
    read_manifest,
)

if TYPE_CHECKING:
    from torch import Tensor


FORMATS = ("peft",)
_OUTPUT_LAYERS = ("lm_head", "embed_out")
_TOLD = (
    "method", "data", "r", "lora_alpha", "target_modules", "layers", "covariance", "prior_mean", "prior_std",
    "empirical_prior", "stochastic_modules", "stochastic_layers", "steps", "seed", "dtype", "bits",
)  # fmt: skip


def prepare(
    directory: Path,
    number: int,
    output: Path,
    *,
    form: str = "peft",
    seed: int = 0,
    draws: str = "independent",
    name: str = "particle",
) -> tuple[Identity, dict[str, Any], RunRecord | None]:
    """What `export` will write, checked; imports no torch.

    Returns:
        the particles' identity, the adapter's configuration, and the run's record (None where there is none).

    Raises:
        UserError: as `export`.
    """
    if form not in FORMATS:
        raise UserError(f"There is no format {form!r}; choose {', '.join(FORMATS)}.")
    if number < 1:
        raise UserError(f"The number of particles is {number}; it must be at least 1, 10 is usual.")
    if seed < 0:
        raise UserError(f"The seed is {seed}; it must be 0 or more.")
    if draws == "moments" and number < 2:
        raise UserError("One particle has no variance to match: moments needs at least 2 particles.")
    _ = Sampling(draws=draws)
    if not name or any(c.isspace() or c in "/=," for c in name):
        raise UserError(f"The name is {name!r}; adapters are named after it, so give letters, digits, - and _.")
    if not directory.is_dir():
        raise UserError(f"There is no directory {directory}; give a run made by scalabl train.")
    config = require_adapter(directory)
    if config["peft_type"] != "SCALABL":
        raise UserError(
            f"{directory} is a plain LoRA without a posterior, so it has no particles: serve it as it is, or make it "
            "Bayesian first with scalabl bayesianize."
        )
    record = RunRecord.read_finished(directory) if (directory / RECORD).is_file() else None
    joint = directory / JOINT
    identity = Identity(
        sha256(directory / ADAPTER), sha256(joint) if joint.is_file() else None, number, seed, draws
    )  # fmt: skip
    _require_place(output, identity, name)
    return identity, config, record


def export(
    directory: Path,
    number: int,
    output: Path | None = None,
    *,
    form: str = "peft",
    seed: int = 0,
    draws: str = "independent",
    name: str = "particle",
) -> ParticleManifest:
    """Write OUT/particles/0 .. N-1 and OUT/particles/manifest.json; they appear together or not at all.

    Particle k is particle k of `scalabl.particles(model, N, seed=seed)`: its rank patterns and scaling are the run's,
    its A is diag(s_k) A. What PEFT copies of the frozen embeddings into the adapter of an output layer is left out.

    Args:
        directory: an adapter with a posterior: of `scalabl train`, `scalabl bayesianize`, or any trainer's
            `save_pretrained`.
        number: N, at least 1.
        output: OUT, the run's own directory by default.
        form: "peft", plain LoRAs.
        seed: of the draws.
        draws: their kind (`scalabl.predictive.sampling.DRAWS`).
        name: the particles will be served as NAME-0 .. NAME-(N-1).

    Returns:
        the manifest; of what is there already where it is the same export.

    Raises:
        UserError: a plain or an unfinished run, altered files, a bad setting, another export in OUT, or no place to
            write.
    """
    output = output or directory
    identity, raw, record = prepare(directory, number, output, form=form, seed=seed, draws=draws, name=name)
    target = output / PARTICLES
    if target.exists():
        return read_manifest(output)

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from scalabl.core.progress import progress_bar
    from scalabl.serving.draws_from_files import particle_values
    from scalabl.tuner.config import ScalaBLConfig
    from scalabl.tuner.mean_adapter import fold, write_plain_adapter

    config = ScalaBLConfig.from_pretrained(str(directory))
    assert isinstance(config, ScalaBLConfig)
    try:
        tensors = load_file(directory / ADAPTER)
        # PEFT copies frozen weights of the base model beside the adapter of an output layer: gigabytes a particle
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".base_layer.weight")}
        values = particle_values(directory, tensors, config, number, seed=seed, draws=draws)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{directory / ADAPTER} is truncated or altered ({error}); restore the file.") from error

    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / f".{PARTICLES}.{os.getpid()}"
    try:
        digests = []
        with progress_bar() as progress:
            bar = progress.add_task("exporting", total=number, detail="")
            for k in range(number):
                plain = fold(tensors, config.unit_rows, lambda prefix, _mean, k=k: values[prefix][k])  # type: ignore[misc]
                write_plain_adapter(unfinished / str(k), plain, config)
                digests.append(sha256(unfinished / str(k) / ADAPTER))
                progress.advance(bar)
        manifest = _manifest(directory, identity, raw, record, name, tensors, tuple(digests))
        write_json(unfinished / MANIFEST, manifest.as_dict())
        os.replace(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if made and not any(output.iterdir()):
            output.rmdir()
        raise
    return manifest


def _manifest(
    directory: Path,
    identity: Identity,
    config: dict[str, Any],
    record: RunRecord | None,
    name: str,
    tensors: dict[str, Tensor],
    digests: tuple[str, ...],
) -> ParticleManifest:
    targets = config["target_modules"]
    output_layer = any(f".{layer}.lora_A." in key for key in tensors for layer in _OUTPUT_LAYERS)
    labels = record.labels if record else None
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
        recipe={key: record.recipe.get(key) for key in _TOLD} if record else None,
        scoring=record.scoring if record else None,
        temperature=_temperature(directory, identity),
        labels=labels or None,
        warnings=limits_of(config, record, rank, output_layer),
    )


def _dtype(record: RunRecord | None) -> str | None:
    """The precision of the base model in training, as `load_base` chose it."""
    if record is None:
        return None
    dtype: str = record.recipe["dtype"]
    if dtype == "auto":
        return "float32" if record.device.startswith("cpu") else "bfloat16"
    return dtype


def _temperature(directory: Path, identity: Identity) -> float | None:
    """What the method `temperature` fitted on this very adapter."""
    path = directory / "posthoc" / "temperature" / "temperature.json"
    if not path.is_file():
        return None
    mend = "fit temperature again"
    facts = read_json(path, missing="", mend=mend, expected=f"a temperature; {mend}", key="temperature")
    return float(facts["temperature"]) if facts.get("adapter_sha256") == identity.adapter_sha256 else None


def _require_place(output: Path, identity: Identity, name: str) -> None:
    """Refuse a place that holds another export or cannot be written."""
    target = output / PARTICLES
    other = "choose another --output or delete it"
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose another --output.")
    if target.exists():
        if not (target / MANIFEST).is_file():
            raise UserError(f"{target} exists and holds no {MANIFEST}; {other}.")
        there = read_manifest(output)
        if there.identity != identity or there.name != name:
            raise UserError(f"{target} holds another export ({_difference(there, identity, name)}); {other}.")
        if not is_whole(particles_directory(output), there):
            raise UserError(f"{target} was truncated or altered since it was exported; delete it and export again.")
        return
    require_place(output)


def _difference(there: ParticleManifest, identity: Identity, name: str) -> str:
    """The first setting in which an export differs."""
    if there.name != name:
        return f"its name is {there.name}, now {name}"
    for key in ("number", "seed", "draws"):
        before, now = getattr(there.identity, key), getattr(identity, key)
        if before != now:
            return f"its {key} is {before}, now {now}"
    return "of another adapter"
