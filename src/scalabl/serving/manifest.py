"""OUT/particles/manifest.json: what the exported particles are, and how rows are scored with them. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.core.files import ADAPTER, read_json, sha256

PARTICLES = "particles"
MANIFEST = "manifest.json"
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
    """

    adapter_sha256: str
    joint_sha256: str | None
    number: int
    seed: int
    draws: str


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
        temperature: fitted on the run's validation rows by the method `temperature`, None if it was not.
        labels: the class words of every row, None where rows have choices of their own.
        warnings: what a server will not do with them as this program does.
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

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @property
    def adapters(self) -> tuple[str, ...]:
        """NAME-0 .. NAME-(N-1)."""
        return tuple(f"{self.name}-{k}" for k in range(self.identity.number))


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
        return ParticleManifest(
            **{f.name: content[f.name] for f in fields(ParticleManifest)} | {"identity": of_identity} | lists
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest of particles ({error}); {mend}.") from error


def is_whole(directory: Path, manifest: ParticleManifest) -> bool:
    """Whether every particle's weights in OUT/particles are what was written."""
    files = [directory / str(k) / ADAPTER for k in range(manifest.identity.number)]
    return all(f.is_file() and sha256(f) == digest for f, digest in zip(files, manifest.sha256, strict=True))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
