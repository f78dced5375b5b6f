"""The line that serves exported particles with vLLM, one adapter each. Imports no torch.

What vLLM will not do with a run's particles as this program does. Imports no torch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scalabl.core.errors import UserError
from scalabl.runs.record import RunRecord
from scalabl.serving.manifest import ParticleManifest

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
        UserError: the base model is not named, or the rank is above what vLLM takes.
    """
    base = base or manifest.base_model
    if base is None:
        raise UserError("The particles do not name their base model; give it with --model.")
    rank = next((r for r in MAX_LORA_RANKS if r >= manifest.rank), None)
    if rank is None:
        raise UserError(f"The rank is {manifest.rank}, but vLLM serves at most {MAX_LORA_RANKS[-1]}; train a smaller.")
    number = str(manifest.identity.number)
    modules = [_module(name, directory.resolve() / str(k)) for k, name in enumerate(manifest.adapters)]
    # without a dtype vLLM would serve a float32 model in half precision
    precision = [] if manifest.dtype is None else ["--dtype", manifest.dtype]
    return [
        "vllm", "serve", base, "--host", host, "--port", str(port), *precision, "--enable-lora",
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


# LoRA on the output layer: its part is dropped from prompt logprobs; generated tokens' are right
OUTPUT_LAYER_ISSUE = "vLLM issue 51594"


def limits_of(
    config: dict[str, Any], record: RunRecord | None, rank: int, adapts_output_layer: bool
) -> tuple[str, ...]:
    """Sentences, none where the particles are served as they are.

    Args:
        config: the adapter's configuration.
        record: the run's, None where there is none.
        rank: the largest of a layer.
        adapts_output_layer: whether lm_head is adapted.
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
    if config.get("modules_to_save"):
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
    return tuple(found)
