"""`mean/`: the plain LoRA with the posterior mean folded in, A_mean = diag(s_mu) A, that any other tool loads.

It is made from the adapter's own file, so that it is right for gathered, sharded or hand-made checkpoints alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.core.files import writing
from scalabl.core.modules import split_leaf
from scalabl.posterior.gaussian import POSTERIORS, Gaussian

MEAN_DIRECTORY = "mean"


def projection_rows(direction: Tensor, unit_rows: bool) -> Tensor:
    """(r, d_in) the projection A as the forward pass uses it, in float32."""
    return F.normalize(direction.float(), dim=1) if unit_rows else direction.float()


def plain_lora_config(config: LoraConfig) -> LoraConfig:
    """The LoraConfig with the same targets, ranks and scaling."""
    shared = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
    return LoraConfig(**shared)


@dataclass(frozen=True)
class StoredLeaf:
    """A stochastic layer in an adapter's file.

    Attributes:
        prefix: of its tensors' names, up to and with "lora_A.".
        direction: (r, d_in) A, before its rows are brought to unit length.
        posterior: q(s).
        up: (d_out, r) B.
    """

    prefix: str
    direction: Tensor
    posterior: Gaussian
    up: Tensor


def stored_leaves(tensors: Mapping[str, Tensor], covariance: str) -> dict[str, StoredLeaf]:
    """The stochastic layers in an adapter's file by the name of the layer they adapt.

    Args:
        tensors: the contents of `adapter_model.safetensors`.
        covariance: of the adapter's configuration.

    Raises:
        KeyError, RuntimeError: a layer lacks tensors, or they have other shapes.
    """
    found = {}
    for name, direction in tensors.items():
        layer, rest = split_leaf(name)
        if rest == "direction":
            prefix = name.removesuffix(rest)
            start = f"{prefix}posterior."
            state = {n.removeprefix(start): tensor for n, tensor in tensors.items() if n.startswith(start)}
            blank = torch.ones_like(state["log_mean"])
            posterior = POSTERIORS[covariance](blank, blank)
            posterior.load_state_dict(state)
            up = tensors[f"{prefix.removesuffix('lora_A.')}lora_B.weight"]
            found[layer] = StoredLeaf(prefix, direction, posterior, up)
    return found


def fold(tensors: dict[str, Tensor], unit_rows: bool, s_of: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Adapter tensors by name -> a plain LoRA's, with A_k = diag(s) A for the s that `s_of(prefix, mean)` gives.

    Args:
        tensors: the contents of `adapter_model.safetensors`.
        unit_rows: of the adapter's configuration.
        s_of: (prefix of the leaf's names, its mean (r,)) -> s (r,).
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if split_leaf(name)[1] == "direction":
            prefix = name.removesuffix("direction")
            rows = projection_rows(tensor, unit_rows)
            s = s_of(prefix, tensors[f"{prefix}posterior.log_mean"].float().exp())
            plain[f"{prefix}weight"] = (s[:, None] * rows).to(tensor.dtype).contiguous()
        elif ".posterior." not in name:
            plain[name] = tensor
    return plain


def write_plain_adapter(directory: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """Write a plain LoRA directory (safetensors and JSON); each file appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    with writing(directory / SAFETENSORS_WEIGHTS_NAME) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})
    lora = plain_lora_config(config)
    lora.inference_mode = True
    lora.save_pretrained(str(directory))


def refuse_pickled_weights(save_directory: str | Path) -> None:
    """Refuse a directory whose newest weights are a pickle, which runs code when it is loaded.

    Raises:
        UserError: `adapter_model.bin` is there, and no newer `adapter_model.safetensors`.
    """
    pickled, safe = Path(save_directory) / WEIGHTS_NAME, Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
    if pickled.exists() and not (safe.exists() and safe.stat().st_mtime_ns >= pickled.stat().st_mtime_ns):
        raise UserError(
            f"ScalaBL adapters are saved as safetensors alone: delete {pickled} and call save_pretrained without "
            "safe_serialization=False."
        )


def remove_mean_adapter(save_directory: str | Path) -> None:
    """Remove the files of a `mean/`, if there is one; the directory goes too where nothing else is in it."""
    directory = Path(save_directory) / MEAN_DIRECTORY
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()
