"""The one token that an encoder's head reads, for which alone the last layer is computed above its attention.

BERT and its kin hand their head the hidden state of a row's first token. What stands above the attention of the last
layer works on each token by itself, so that nobody reads what becomes of the others: three quarters of that layer's
products, forwards and backwards. Whether a model is such a one is tried on it, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from scalabl.core.modules import eval_mode
from scalabl.scoring.reading import gap, tolerance
from scalabl.tuner.layers import decoder_layers, sequence_classifier, unwrap
from scalabl.tuner.state import mean_of_any
from scalabl.tuner.threads import base_model, own

# of a model its last layer, where the other tokens may be left out above its attention
_known: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()
_whole: ContextVar[bool] = ContextVar("whole_rows", default=False)


@contextmanager
def whole_rows() -> Iterator[None]:
    """Within it this thread's passes compute every token of a row, for those who look at hidden states."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


@contextmanager
def read_token_alone(model: nn.Module, *, on_meta: bool = False) -> Iterator[None]:
    """Within it a sequence classifier computes what no other token needs for the token alone that its head reads, if it
    was found to be such a model. A layer that backward passes compute once more has left this context by then, and is
    whole.

    Args:
        model: the model.
        on_meta: its tensors have no numbers, with which it could be tried; its kind decides.
    """
    base = base_model(model)
    last = _last_layer(model) if on_meta and base not in _known else _known.get(base)
    again = last is not None and last.training and getattr(last, "gradient_checkpointing", False)
    with nullcontext() if last is None or again or _whole.get() else _first_token(last):
        yield


def reads_first_token(model: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """Whether a head's logits are the same without the last layer's other tokens: tried once, where no particles and
    hooks are.

    Args:
        model: a sequence classifier.
        inputs: keywords of its forward pass, of a row or more.
    """
    base = base_model(model)
    if base not in _known:
        last = _last_layer(model)
        same = last is not None and _same_logits(unwrap(model), inputs, last)
        if same is None:  # nothing can be told now
            return False
        _known[base] = last if same else None
    return _known[base] is not None


def known_first_token(model: nn.Module) -> bool:
    """What `reads_first_token` found; False before it was tried."""
    return _known.get(base_model(model)) is not None


def remember_first_token(model: nn.Module, found: bool) -> None:
    """Take over what another process has found out of the same model."""
    _known.setdefault(base_model(model), _last_layer(model) if found else None)


@torch.no_grad()
def _same_logits(model: nn.Module, inputs: dict[str, Tensor], last: nn.Module) -> bool | None:
    with eval_mode(model), mean_of_any(model):
        try:
            whole = model(**inputs).logits
        except torch.OutOfMemoryError:
            raise
        except Exception:  # among particles that these rows cannot carry, or whatever the passes to come will say
            return None
        try:
            with _first_token(last):
                alone = model(**inputs).logits
        except torch.OutOfMemoryError:
            raise
        except Exception:  # what stands above takes no shorter rows
            return False
    return alone.shape == whole.shape and gap(alone, whole) <= tolerance(model)


@contextmanager
def _first_token(last: nn.Module) -> Iterator[None]:
    def first(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value[:, :1] for value in args)

    above: Any = last.attention
    handle = above.output.register_forward_pre_hook(own(first))
    try:
        yield
    finally:
        handle.remove()


def _last_layer(model: nn.Module) -> nn.Module | None:
    """The last layer of BERT and its kin, whose attention has an `output` behind the mixing of tokens; None of other
    models, and of decoders."""
    base = sequence_classifier(model)
    if base is None or getattr(base.config, "is_decoder", False):
        return None
    last = decoder_layers(model)[-1]
    above = getattr(getattr(last, "attention", None), "output", None)
    return last if isinstance(above, nn.Module) and hasattr(above, "LayerNorm") else None
