"""The trunk's output on disk: computed once for a model and its rows, whatever run, seed or method reads it.

A store is one safetensors file a list of rows, named after everything that decides its content: the weights of the
trunk, its depth and precision, the model's configuration, the library's version, and every token, position and segment
of the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scalabl.core.console import progress_bar
from scalabl.core.files import cache_directory, writing
from scalabl.core.modules import eval_mode
from scalabl.scoring.base import Encoded
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.threads import base_model

LARGEST = 4 * 2**30  # bytes of one store, over which every layer is run every time
# of a configuration: where a model was from, and the labels of its head
_OF_NO_LAYER = ("_name_or_path", "transformers_version", "architectures", "id2label", "label2id", "problem_type")
ALL_STORES = 16 * 2**30  # bytes of all stores, over which the least recently used go


def with_stored_trunk(
    scorer: Scorer, rows: Sequence[Encoded], *, batch_size: int = 8, description: str = "frozen layers, once"
) -> list[Encoded]:
    """The rows with the trunk's output, from disk or computed now; unchanged where there is no trunk to share, or where
    the architecture cannot resume from it.

    Args:
        scorer: the model with its trunk.
        rows: encoded rows.
        batch_size: rows at a time, where it has to be computed.
        description: what the progress bar says.
    """
    trunk = scorer.trunk
    dtype = next(p.dtype for p in scorer.model.parameters() if p.is_floating_point())
    size = sum(len(row.input_ids) for row in rows) * scorer.model.config.get_text_config().hidden_size * dtype.itemsize
    if trunk is None or trunk.depth == 0 or size > LARGEST or not rows:
        return list(rows)
    if not trunk.resumes(scorer.model, scorer.scoring.collate(rows[:2]).to(scorer.device), trunk.depth):
        return list(rows)
    path = cache_directory() / "trunks" / f"{_key(scorer, rows, dtype)}.safetensors"
    hidden = _read(path)
    if hidden is None:
        hidden = _compute(scorer, rows, batch_size, description)
        with suppress(OSError, SafetensorError):  # a full or read-only cache costs time, not the run
            _write(path, hidden)
    ends = torch.tensor([len(row.input_ids) for row in rows]).cumsum(0).tolist()
    return [replace(row, trunk=hidden[end - len(row.input_ids) : end]) for row, end in zip(rows, ends, strict=True)]


@torch.no_grad()
def _compute(scorer: Scorer, rows: Sequence[Encoded], batch_size: int, description: str) -> Tensor:
    """(total tokens, d): the rows' trunk outputs behind each other."""
    assert scorer.trunk is not None
    parts: list[Tensor] = [torch.empty(0)] * len(rows)
    with eval_mode(scorer.model), progress_bar() as progress:
        bar = progress.add_task(description, total=len(rows), detail="")
        for indices, chunk in scorer.batches(rows, batch_size):
            batch = scorer.scoring.collate(chunk)
            output = scorer.trunk.encode(scorer.model, batch.to(scorer.device)).cpu()
            for index, segments, values in zip(indices, batch.segments, output, strict=True):
                parts[index] = values[segments >= 0]
            progress.advance(bar, len(indices))
    return torch.cat(parts)


def _key(scorer: Scorer, rows: Sequence[Encoded], dtype: torch.dtype) -> str:
    assert scorer.trunk is not None
    digest = hashlib.sha256()
    attention = scorer.model.config._attn_implementation
    digest.update(f"2|{transformers.__version__}|{dtype}|{scorer.trunk.depth}|{attention}|".encode())
    config = scorer.model.config.get_text_config().to_dict()
    said = {name: value for name, value in config.items() if name not in _OF_NO_LAYER}
    digest.update(json.dumps(said, sort_keys=True, default=str).encode())
    layers = list(scorer.trunk.layers)
    for layer in layers[: scorer.trunk.depth]:
        digest.update(_weights(layer))
    # embeddings, and what layers share; not the head, nor what a run trains in front of it
    within = {module for layer in layers for module in layer.modules()}
    base: Any = base_model(scorer.model)
    for name, module in base.base_model.named_modules():
        if module not in within and "pooler" not in name:
            digest.update(_weights(module, recurse=False))
    for row in rows:
        types = () if row.token_types is None else (row.token_types,)
        digest.update(repr((row.input_ids, row.position_ids, row.segments, *types)).encode())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _weights(module: nn.Module, *, recurse: bool = True) -> bytes:
    """A digest of a module's weights: sums that no training step leaves unchanged, and a sample of the values."""
    digest = hashlib.sha256()
    for name, tensor in _plain_tensors(module, recurse=recurse):
        value = tensor.reshape(-1)
        sample = value[:: max(1, value.numel() // 1024)].float().cpu().numpy().tobytes()
        sums = (value.double().sum().item(), value.double().square().sum().item())
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|{sums}".encode() + sample)
    return digest.digest()


def _plain_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """A module's parameters; those of quantised weights with their scales."""
    named = dict(module.named_parameters(recurse=recurse))
    for name, parameter in named.items():
        if is_traceable_wrapper_subclass(parameter):  # torchao's: integers and scales inside one tensor
            for inner in parameter.__tensor_flatten__()[0]:
                yield f"{name}.{inner}", getattr(parameter, inner).detach()
        else:
            yield name, parameter.detach()
    if any(not parameter.is_floating_point() for parameter in named.values()):  # bitsandbytes': scales beside them
        yield from ((name, tensor) for name, tensor in module.state_dict().items() if name not in named)


def _read(path: Path) -> Tensor | None:
    try:
        hidden = load_file(path)["hidden"]
        os.utime(path)  # recently used
    except (OSError, SafetensorError, KeyError):
        return None
    return hidden


def _write(path: Path, hidden: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as unfinished:
        save_file({"hidden": hidden.contiguous()}, unfinished)
    stores = sorted(path.parent.glob("*.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for store in stores:
        total += store.stat().st_size
        if total > ALL_STORES and store != path:
            store.unlink(missing_ok=True)
