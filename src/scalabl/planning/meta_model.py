"""The model of a training without its weights: built from its configuration on the meta device and adapted there.

A deep model is measured at a small depth: what a step takes grows by the same bytes and operations with each further
layer of a kind. So two layers of each kind are kept, the others are passed through, and one more of each kind tells
what the rest of them add.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from scalabl.core.errors import UserError, one_line
from scalabl.core.remote_code import trust_remote_code, why_refused
from scalabl.planning.meta_device import DeviceKernels, quantize
from scalabl.runs.head import keep_whole
from scalabl.runs.method import TrainedMethod, load_method
from scalabl.runs.models import DTYPES
from scalabl.runs.settings import Settings

_SMALLEST, _BLOCK = 4096, 256  # numbers: smaller tensors keep states of 32 bit; a state of 8 bit has a scale a block

# numbers that are kept for each parameter, by how the optimiser's name in TrainingArguments begins; else Adam's two
_STATES = {"sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "ademamix": 3}


@dataclass(frozen=True)
class Counts:
    """Parameters, and the bytes of what stays as long as the model does.

    Attributes:
        base, lora, variational: numbers, as in a run's record.
        weights: bytes of the base model, its quantisation's constants and its buffers included.
        adapter: bytes of the adapter.
        gradients: bytes of the gradients of all that is trained.
    """

    base: int
    lora: int
    variational: int
    weights: int
    adapter: int
    gradients: int


def compute_dtype(settings: Settings, device: str) -> torch.dtype:
    """The precision that a training's model has on a device."""
    automatic = "float32" if device == "cpu" else "bfloat16"
    return DTYPES[automatic if settings.machine.dtype == "auto" else settings.machine.dtype]


def autocast_dtype(settings: Settings, device: str) -> torch.dtype | None:
    """The precision of automatic mixed precision while training, which a run turns on in its Trainer."""
    return torch.bfloat16 if settings.machine.dtype == "bfloat16" and device != "cpu" else None


def build(
    settings: Settings, config: PretrainedConfig, device: str, labels: int | None = None
) -> tuple[PeftModel, Counts]:
    """The adapted model on the meta device, and what is in it.

    Args:
        settings: what is to be trained.
        config: of the base model.
        device: "cpu" or "cuda", where it is to be trained.
        labels: how many its classification head has; None for a language model.

    Raises:
        UserError: it is no causal language model (with labels: has no form with a head), or the adapter does not fit.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            kind: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
            if labels is not None:
                config = copy.deepcopy(config)
                config.num_labels = labels
            dtype = compute_dtype(settings, device)
            base: PreTrainedModel = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code())
        except ValueError as error:
            named = getattr(config, "model_type", type(config).__name__)
            kinds = "is no causal language model" if labels is None else "has no classification head"
            why = why_refused(error) or f"{named} {kinds}"
            raise UserError(f"The model {settings.model} cannot be loaded: {why}.") from error
        except (RuntimeError, ArithmeticError, TypeError) as error:  # sizes that no layer can have
            raise UserError(f"The configuration of {settings.model} makes no model: {one_line(error)}") from error
        base.tie_weights()  # which older Transformers leave to what loads numbers
        keep_whole(base)
        number = sum(parameter.numel() for parameter in base.parameters())
        if settings.machine.bits is not None:
            quantize(base, settings.machine.bits, settings.machine.quantization, device)
        method = load_method(settings.method)
        model: Any = get_peft_model(base, method.adapter_config(settings, base))
    if settings.optimisation.gradient_checkpointing:
        use_checkpointing(model, settings, device)
    return model, _count(model, method, number)


def use_checkpointing(model: PeftModel, settings: Settings, device: str) -> None:
    """Gradient checkpointing as the Trainer turns it on; what is computed anew has the device's kernels."""

    def contexts() -> tuple[AbstractContextManager[None], DeviceKernels]:
        return nullcontext(), DeviceKernels(device, autocast_dtype(settings, device))

    base: Any = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # the state of a random generator takes no memory that counts, and the meta device has none
        enable({"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts})


def model_dtype(model: PeftModel) -> torch.dtype:
    """The precision of the model's activations."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def hidden_size(model: PeftModel) -> int:
    """Numbers of a token's hidden state."""
    width: int = model.config.get_text_config().hidden_size
    return width


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages of some tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _count(model: PeftModel, method: TrainedMethod, base: int) -> Counts:
    named = dict(model.named_parameters())
    lora, variational = method.count(model)
    stored = named | dict(model.named_buffers())
    return Counts(
        base=base,
        lora=lora,
        variational=variational,
        weights=storage_bytes(tensor for name, tensor in stored.items() if "lora_" not in name),
        adapter=storage_bytes(tensor for name, tensor in stored.items() if "lora_" in name),
        gradients=sum(p.numel() * p.element_size() for p in named.values() if p.requires_grad),
    )


def optimizer_bytes(name: str, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of the states of all trained parameters, wherever they are paged to.

    An optimiser that is not known here is taken for AdamW, whose two states a number are the most that is common.

    Args:
        name: as `TrainingArguments.optim` has it.
        parameters: those of the model; the ones that are not trained count for nothing.
    """
    states = next((n for start, n in _STATES.items() if name.removeprefix("paged_").startswith(start)), 2)
    return sum(_state_bytes(name, states, p) for p in parameters if p.requires_grad)


def _state_bytes(name: str, states: int, parameter: nn.Parameter) -> int:
    number = parameter.numel()
    if name == "adafactor":  # rows and columns of a matrix, all numbers of a vector
        if parameter.dim() < 2:
            return 4 * number
        rows, columns = parameter.shape[-2:]
        return 4 * (rows + columns) * (number // (rows * columns))
    if "8bit" in name and number >= _SMALLEST:
        return states * (number + 4 * math.ceil(number / _BLOCK))
    own = name.removeprefix("paged_").startswith(("adamw_torch", "sgd", "adagrad")) or name == "rmsprop"
    return states * number * (parameter.element_size() if own and "bit" not in name else 4)


_KEPT = 2


class _Pass(nn.Module):
    """Stands in for a layer that is left out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type  # older Transformers choose a mask by it

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


class _OtherForm(Exception):
    """Layers of this model do not take and give plain hidden states, so that none can be passed through."""


def over_depth(
    layers: nn.ModuleList, kinds: Sequence[Hashable], measure: Callable[[], Sequence[int]]
) -> tuple[int, ...]:
    """What `measure` would give with all layers.

    Args:
        layers: the decoder layers.
        kinds: of each layer; layers of a kind are alike.
        measure: runs the model and returns numbers that are linear in how many layers of each kind there are.
    """
    of_kind: dict[Hashable, list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        of_kind[kind].append(index)
    fewest = {kind: min(len(indices), _KEPT) for kind, indices in of_kind.items()}
    more = [kind for kind, indices in of_kind.items() if len(indices) > _KEPT]

    def at(numbers: dict[Hashable, int]) -> Sequence[int]:
        kept = {index for kind, number in numbers.items() for index in of_kind[kind][-number:]}
        with _shortened(layers, kept):
            return measure()

    with suppress(_OtherForm):
        base = at(fewest)
        total = list(base)
        for kind in more:
            longer = at(fewest | {kind: _KEPT + 1})
            rest = len(of_kind[kind]) - _KEPT
            total = [sum_ + rest * (b - a) for sum_, a, b in zip(total, base, longer, strict=True)]
        return tuple(total)
    return tuple(measure())


def layer_kinds(layers: nn.ModuleList, types: Sequence[str] | None, marks: Sequence[int]) -> list[Hashable]:
    """What distinguishes each layer: its modules, the shapes of their parameters, its type of attention, and where it
    lies.

    Args:
        layers: the decoder layers.
        types: of their attention (full, sliding), where the configuration names them.
        marks: numbers of layers that are of a kind of their own, and part those below from those above.
    """
    kinds: list[Hashable] = []
    for index, layer in enumerate(layers):
        modules = tuple((name, type(module).__name__) for name, module in layer.named_modules())
        shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        place = tuple((index > mark) - (index < mark) for mark in marks)
        kinds.append((modules, shapes, types[index] if types else None, place))
    return kinds


@contextmanager
def _shortened(layers: nn.ModuleList, kept: set[int]) -> Iterator[None]:
    original = list(layers)
    left_out = len(kept) < len(original)
    handles = []
    try:
        for index, layer in enumerate(original):
            if index not in kept:
                layers[index] = _Pass(layer)
            elif left_out:
                handles.append(layer.register_forward_hook(_plain))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for index, layer in enumerate(original):
            layers[index] = layer


def _plain(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not isinstance(output, Tensor) or (args and args[0].shape != output.shape):
        raise _OtherForm
