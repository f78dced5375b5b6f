"""OUT/particles/manifest.json: what the exported particles are, and how rows are scored with them. Imports no torch.

`prepare` checks what an export will write against what is there; `vllm_command` is the line that serves the particles,
one adapter each, and `limits_of` says what vLLM will not do with them as this program does.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, JOINT, read_json, require_place, sha256
from scalabl.inference.calibration import Calibration
from scalabl.inference.settings import temperature_in
from scalabl.predictive.sampling import Sampling
from scalabl.runs.directory import require_adapter
from scalabl.runs.record import RECORD, RunRecord

PARTICLES = "particles"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"  # beside the particles, where one was saved beside the adapter
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Identity:
    """What decides the particles.

    Attributes:
        adapter_sha256: of the adapter that they were drawn from.
        joint_sha256: of its covariance between layers, None where there is none.
        number: N.
        seed: of the draws.
        draws: independent, antithetic, sobol or moments.
        scale: tau of the run's calibration, by which the posterior's standard deviations were multiplied.
    """

    adapter_sha256: str
    joint_sha256: str | None
    number: int
    seed: int
    draws: str
    scale: float = 1.0


@dataclass(frozen=True)
class ParticleManifest:
    """The manifest of N exported particles.

    Attributes:
        format_version: of this file.
        scalabl: the version that wrote it.
        format: "peft": particle k is the plain LoRA in the directory k beside this file.
        identity: what decides the particles.
        sha256: of the weights of each, in order.
        name: the particles are served as NAME-0 .. NAME-(N-1).
        base_model: the base model's directory or Hub id, None where the adapter does not name it.
        base_fingerprint: its identity, as the adapter has it.
        rank: the largest rank of a layer.
        target_modules: what is adapted.
        adapts_output_layer: whether the output layer (lm_head) is among it.
        dtype: the precision that the run was trained in, None where that is not known.
        recipe: what the run was trained with, None where no run's record lies beside the adapter.
        scoring: how rows are scored, None likewise.
        temperature: the run's calibration's, or of the method `temperature`; None if neither was fitted.
        labels: the class words of every row, None where rows have choices of their own.
        warnings: what a server will not do with them as this program does.
        calibrated: whether scale and temperature are those of the run's calibration, so that a client tempers.
        head: whether they are classifiers with a head of their own each.
        head_labels: outputs of a head that vLLM loads with an adapter, which is a decoder's; None of any other.
    """

    format_version: int
    scalabl: str
    format: str
    identity: Identity
    sha256: tuple[str, ...]
    name: str
    base_model: str | None
    base_fingerprint: str | None
    rank: int
    target_modules: tuple[str, ...] | str
    adapts_output_layer: bool
    dtype: str | None
    recipe: dict[str, Any] | None
    scoring: dict[str, Any] | None
    temperature: float | None
    labels: tuple[str, ...] | None
    warnings: tuple[str, ...] = ()
    calibrated: bool = False
    head: bool = False
    head_labels: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; of an uncalibrated run without a head what older versions read too."""
        values = asdict(self)
        if not self.calibrated:
            del values["calibrated"], values["identity"]["scale"]
        if not self.head:
            del values["head"]
        if self.head_labels is None:
            del values["head_labels"]
        return values

    @property
    def adapters(self) -> tuple[str, ...]:
        """NAME-0 .. NAME-(N-1)."""
        return tuple(f"{self.name}-{k}" for k in range(self.identity.number))


_LATER: dict[str, Any] = {"calibrated": False, "head": False, "head_labels": None}  # which older files lack


def particles_directory(output: Path) -> Path:
    """OUT/particles, given OUT or itself."""
    return output if (output / MANIFEST).is_file() else output / PARTICLES


def read_manifest(output: Path) -> ParticleManifest:
    """The manifest in OUT/particles (or in OUT itself).

    Raises:
        UserError: there is none, or it is of another format.
    """
    path = particles_directory(output) / MANIFEST
    mend = "delete the directory and call scalabl export again"
    missing = f"{output} holds no exported particles; make them with scalabl export DIR --particles N."
    content = read_json(path, missing=missing, mend=mend, expected=f"a manifest of particles; {mend}", key="identity")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} is of format {content.get('format_version')}, but this version reads {FORMAT_VERSION}; {mend}."
        )
    try:
        of_identity = Identity(**content["identity"])
        lists = {name: _tuple(content[name]) for name in ("sha256", "labels", "target_modules", "warnings")}
        later = {name: content.get(name, usual) for name, usual in _LATER.items()}
        return ParticleManifest(
            **{f.name: content[f.name] for f in fields(ParticleManifest) if f.name not in later}
            | {"identity": of_identity}
            | later
            | lists
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest of particles ({error}); {mend}.") from error


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def prepare(
    directory: Path,
    number: int,
    output: Path,
    *,
    seed: int = 0,
    draws: str = "independent",
    name: str = "particle",
    raw: bool = False,
) -> tuple[Identity, dict[str, Any], RunRecord | None]:
    """What `export` will write, checked; imports no torch.

    Returns:
        the particles' identity, the adapter's configuration, and the run's record (None where there is none).

    Raises:
        UserError: as `scalabl.serving.export.export`.
    """
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
        sha256(directory / ADAPTER), sha256(joint) if joint.is_file() else None, number, seed, draws,
        1.0 if raw else calibrated_particles(record)[0],
    )  # fmt: skip
    _require_place(output, identity, name, *particles_temperature(directory, record, identity, raw))
    return identity, config, record


def calibrated_particles(record: RunRecord | None) -> tuple[float, float | None]:
    """tau and T that a run was calibrated with for particles; 1 and None where it was not."""
    made = None if record is None else Calibration.of(record)
    return (1.0, None) if made is None or "mc" not in made.temperatures else (made.scale, made.temperatures["mc"])


def particles_temperature(
    directory: Path, record: RunRecord | None, identity: Identity, raw: bool
) -> tuple[float | None, bool]:
    """T that a manifest names for particles, and whether it is of the run's calibration: else of the method
    `temperature`, if it was fitted on this very adapter."""
    fitted = None if raw else calibrated_particles(record)[1]
    if fitted is not None:
        return fitted, True
    path = directory / "posthoc" / "temperature" / "temperature.json"
    if not path.is_file():
        return None, False
    mend = "fit temperature again"
    facts = read_json(path, missing="", mend=mend, expected=f"a temperature; {mend}", key="temperature")
    own = facts.get("adapter_sha256") == identity.adapter_sha256
    return temperature_in(facts, path) if own else None, False


def _is_whole(directory: Path, manifest: ParticleManifest) -> bool:
    """Whether every particle's weights in OUT/particles are what was written."""
    files = [directory / str(k) / ADAPTER for k in range(manifest.identity.number)]
    return all(f.is_file() and sha256(f) == digest for f, digest in zip(files, manifest.sha256, strict=True))


def _require_place(output: Path, identity: Identity, name: str, temperature: float | None, calibrated: bool) -> None:
    """Refuse a place that holds another export or cannot be written."""
    target = output / PARTICLES
    other = "choose another --output or delete it"
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose another --output.")
    if target.exists():
        if not (target / MANIFEST).is_file():
            raise UserError(f"{target} exists and holds no {MANIFEST}; {other}.")
        there = read_manifest(output)
        difference = _difference(there, identity, name, temperature, calibrated)
        if difference is not None:
            raise UserError(f"{target} holds another export ({difference}); {other}.")
        if not _is_whole(target, there):
            raise UserError(f"{target} was truncated or altered since it was exported; delete it and export again.")
        return
    require_place(output)


def _difference(
    there: ParticleManifest, identity: Identity, name: str, temperature: float | None, calibrated: bool
) -> str | None:
    """The first setting in which an export differs; None where none does."""
    if there.name != name:
        return f"its name is {there.name}, now {name}"
    for key in ("number", "seed", "draws", "scale"):
        before, now = getattr(there.identity, key), getattr(identity, key)
        if before != now:
            return f"its {key} is {before}, now {now}"
    if there.identity != identity:
        return "of another adapter"
    if there.calibrated != calibrated:
        return "it is calibrated, now it is not" if there.calibrated else "it is not calibrated, now it is"
    if there.temperature != temperature:
        return f"its temperature is {there.temperature}, now {temperature}"
    return None


# the values that vLLM's --max-lora-rank takes (vllm/config/lora.py; older versions lack some)
MAX_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_command(
    manifest: ParticleManifest, directory: Path, *, base: str | None = None, host: str = "127.0.0.1", port: int = 8000
) -> list[str]:
    """The arguments of `vllm serve` with all particles in one batch.

    Args:
        manifest: of the particles.
        directory: where they lie, OUT/particles, on the server's machine.
        base: the base model's directory or Hub id there; the manifest's by default.
        host: where the server listens; the loopback address by default, so that no other machine reaches it.
        port: likewise.

    Raises:
        UserError: the base model is not named, the rank is above what vLLM takes, or it loads no such classification
            head.
    """
    refuse_head(manifest)
    base = base or manifest.base_model
    if base is None:
        raise UserError("The particles do not name their base model; give it with --model.")
    for what, name in (("base model", base), *(("adapter", name) for name in manifest.adapters)):
        if name.startswith("-"):  # the command is one that users paste into their shell
            raise UserError(f"The {what} is called {name!r}, which vllm serve takes for an option; rename it.")
    rank = next((r for r in MAX_LORA_RANKS if r >= manifest.rank), None)
    if rank is None:
        raise UserError(f"The rank is {manifest.rank}, but vLLM serves at most {MAX_LORA_RANKS[-1]}; train a smaller.")
    number = str(manifest.identity.number)
    modules = [_module(name, directory.resolve() / str(k)) for k, name in enumerate(manifest.adapters)]
    # without a dtype vLLM would serve a float32 model in half precision
    precision = [] if manifest.dtype is None else ["--dtype", manifest.dtype]
    head = ["--runner", "pooling", "--convert", "classify", "--max-lora-cls-labels", str(manifest.head_labels)]
    return [
        "vllm", "serve", base, "--host", host, "--port", str(port), *precision, *(head if manifest.head else []),
        "--enable-lora",
        "--max-lora-rank", str(rank), "--max-loras", number, "--lora-modules", *modules,
    ]  # fmt: skip


def _module(name: str, path: Path) -> str:
    """NAME=PATH, which vLLM takes for JSON where a comma is in it."""
    plain = f"{name}={path}"
    return json.dumps({"name": name, "path": str(path)}) if "," in plain or "=" in name else plain


def as_shell(arguments: Sequence[str]) -> str:
    """One command for a shell, an option or an adapter a line."""
    lines: list[list[str]] = [[]]
    for i, argument in enumerate(arguments):
        if argument.startswith("--") or "--lora-modules" in arguments[:i]:
            lines.append([])
        lines[-1].append(shlex.quote(argument))
    return " \\\n    ".join(" ".join(line) for line in lines)


# what 0.32.0 loads with an adapter is one linear layer on top of a decoder (vllm/lora/lora_model.py)
_HEAD_LIMIT = (
    "vLLM loads no adapter with the classification head of an encoder; scalabl serve answers with it, and PEFT loads "
    "the particles"
)
_HEAD_VERSION = "an adapter's classification head is loaded by vLLM 0.32; older versions refuse modules_to_save"
# LoRA on the output layer: its part is dropped from prompt logprobs; generated tokens' are right
OUTPUT_LAYER_ISSUE = "vLLM issue 51594"


def refuse_head(manifest: ParticleManifest) -> None:
    """Refuse to serve classifiers with a head that vLLM does not load.

    Raises:
        UserError: the particles are such.
    """
    if manifest.head and manifest.head_labels is None:
        raise UserError(f"{_HEAD_LIMIT}.")


def limits_of(
    config: dict[str, Any],
    record: RunRecord | None,
    rank: int,
    adapts_output_layer: bool,
    head_labels: int | None,
    calibrated: bool,
) -> tuple[str, ...]:
    """Sentences, none where the particles are served as they are.

    Args:
        config: the adapter's configuration.
        record: the run's, None where there is none.
        rank: the largest of a layer.
        adapts_output_layer: whether lm_head is adapted.
        head_labels, calibrated: of the manifest.
    """
    found = []
    if adapts_output_layer:
        found.append(
            f"lm_head is adapted, and vLLM leaves that part out of prompt log-probabilities ({OUTPUT_LAYER_ISSUE}); "
            "scalabl.serving.vllm does not ask for those, other clients must not either"
        )
    if rank > MAX_LORA_RANKS[-1]:
        found.append(f"the rank is {rank}, but vLLM serves at most {MAX_LORA_RANKS[-1]}")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        found.append("ranks or scalings differ by layer, which older versions of vLLM ignore; 0.32 does not")
    if config.get("task_type") == "SEQ_CLS":
        found.append(_HEAD_LIMIT if head_labels is None else _HEAD_VERSION)
    elif config.get("modules_to_save"):
        found.append("whole modules were trained (modules_to_save), which vLLM refuses to load")
    if config.get("bias", "none") != "none":
        found.append("biases were trained, which vLLM refuses to load")
    if record is None:
        found.append("the precision of the training is not recorded; vLLM takes half precision unless given a --dtype")
    else:
        bits = record.recipe.get("bits")
        if bits is not None:
            found.append(f"the run's base was quantised to {bits} bits; a base in another precision answers otherwise")
        if record.predictive == "linearized":
            found.append("the run itself predicts linearised; particles are its Monte Carlo predictive")
        if record.calibration is not None and not calibrated:
            option = "" if record.predictive == "linearized" else " --predictive mc"
            unfitted = f"was not fitted for particles; scalabl calibrate{option} fits a temperature of theirs"
            left_out = calibrated_particles(record)[1] is not None
            found.append(
                "the particles are uncalibrated: the run's calibration " + ("is left out" if left_out else unfitted)
            )
    return tuple(found)
