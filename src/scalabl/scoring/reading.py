"""How a model reads rows: packed, under a mask of ours, or plainly, as it reads them itself; and which, tried on it.

Packed: rows padded on the left, the choices of a question behind their prompt, kept apart by the mask.

Plain: no mask at all. What is causal sees nothing that stands behind it, so padding stands on the right, and a question
takes a pass for each of its choices: convolutions, state spaces, linear attention and positions that are counted by
columns read such a row as they read it alone. All passes of a question share one draw of its noise.

A row whose choices stand behind each other, beside a shorter row that is padded, is compared with what the model says
of each choice alone, at the length that the rows have: windows, chunks and biases that go by columns show themselves
there. A model that differs, or takes no such mask, is read plainly, which is as right and slower; one that differs
there too is refused. So is a classification head that padding behind a row changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from scalabl.core.errors import UserError
from scalabl.core.modules import eval_mode
from scalabl.scoring.base import Batch, attention_masks
from scalabl.scoring.images import image_inputs
from scalabl.tuner.layers import learnt_positions, sequence_classifier, unwrap
from scalabl.tuner.state import mean_of_any
from scalabl.tuner.threads import base_model, own

# of the logits' spread, in the mean over the vocabulary: what rounding comes to behind some tens of layers
TOLERANCE = 2e-4
TOLERANCE_OF_16_BITS = 5e-2  # of TF32 and of quantised weights too
ROUNDING = 3  # times what rounding alone comes to here
REFUSED = 5  # times the tolerance, which no rounding explains
LEAST = 32  # tokens of the rows that are tried
# what a model calls keys and values, which Transformers has renamed
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

At = tuple[Tensor, Tensor]  # rows (M,) and columns (M,)
Resume = Callable[[Tensor], AbstractContextManager[None]]


def packed_logits(model: nn.Module, batch: Batch, positions: At | None, cache: Cache | None = None) -> Tensor:
    """Logits (M, V) at some of the last `batch.keep` positions, or (B, keep, V) at all of these, with our mask."""
    inner = unwrap(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    at = None if positions is None else (positions[0], positions[1] - batch.input_ids.shape[1])
    return _logits(
        model,
        at,
        input_ids=batch.input_ids,
        attention_mask=attention_masks(batch, dtype, text_config(inner)),
        logits_to_keep=batch.keep,
        use_cache=cache is not None,
        **{CACHE: cache, "position_ids": batch.position_ids, **image_inputs(inner, batch)},
    )


def plain_logits(model: nn.Module, batch: Batch, positions: At | None, resume: Resume | None = None) -> Tensor:
    """The same logits as the model itself gives them for each choice behind its prompt.

    Args:
        model: a causal language model.
        batch: the rows.
        positions: rows (M,) and columns (M,); the last `batch.keep` columns of all rows if None.
        resume: where the batch has a trunk: hidden states -> a context in which the model begins at them.
    """
    rows, columns = _last(batch) if positions is None else positions
    # the prompt's last token says the same in every pass
    turn_of = batch.segments[rows, columns].clamp_min(1)
    found, places = [], []
    for number, turn in turns(batch, model):
        here = (turn_of == number).nonzero()[:, 0]
        if not len(here):
            continue
        at = (rows[here], turn.place[rows[here], columns[here]] - turn.columns.shape[1])
        begin = nullcontext() if batch.trunk is None or resume is None else resume(turn.of(batch.trunk))
        with begin:
            found.append(_logits(model, at, **turn.inputs(model, batch, -int(at[1].min()))))
        places.append(here)
    logits = torch.cat(found)[torch.cat(places).argsort()]
    return logits if positions is not None else logits.unflatten(0, (len(batch), -1))


@dataclass(frozen=True)
class Turn:
    """One plain pass: every row's prompt and one of its choices, in front of the padding.

    Attributes:
        columns: (B, L) where the tokens stand in the batch.
        real: (B, L) which of them are tokens of this turn, not padding.
        place: (B, T) where a column of the batch stands here.
    """

    columns: Tensor
    real: Tensor
    place: Tensor

    def of(self, values: Tensor) -> Tensor:
        """What belongs to the columns of the batch, (B, T, ...), in this turn's order."""
        rows = torch.arange(len(values), device=values.device)[:, None]
        return values[rows, self.columns]

    def inputs(self, model: nn.Module, batch: Batch, keep: int = 1) -> dict[str, Any]:
        """Keywords of the model's forward pass, with logits of the last `keep` positions."""
        takes = inspect.signature(base_model(model).forward).parameters
        kept = {"logits_to_keep": keep} if "logits_to_keep" in takes else {}
        return {"input_ids": self.of(batch.input_ids), "use_cache": False, **kept}


def turns(batch: Batch, model: nn.Module) -> Iterator[tuple[int, Turn]]:
    """The plain passes of a batch by the numbers of their choices, each beginning with the same state of noise."""
    segments = batch.segments
    wanted = [(segments == 0) | (segments == k) for k in range(1, max(1, int(segments.max())) + 1)]
    length = max(int(mask.sum(dim=1).max()) for mask in wanted)  # the same for all: then so are their draws
    device = next(model.parameters()).device
    noise = _noise(device)
    for number, mask in enumerate(wanted, start=1):
        if number > 1:
            _set_noise(device, noise)
        columns = (~mask).long().argsort(dim=1, stable=True)[:, :length]
        yield number, Turn(columns, mask.gather(1, columns), (mask.cumsum(dim=1) - 1).clamp_min(0))


def _noise(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = None if device.type in ("cpu", "meta") else getattr(torch, device.type).get_rng_state(*_named(device))
    return torch.get_rng_state(), own


def _set_noise(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        getattr(torch, device.type).set_rng_state(state[1], *_named(device))


def _named(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # which has one generator


def _last(batch: Batch) -> At:
    """The last `keep` columns of every row, row by row."""
    rows, length = batch.input_ids.shape
    columns = torch.arange(length - batch.keep, length, device=batch.input_ids.device)
    return torch.arange(rows, device=columns.device).repeat_interleave(batch.keep), columns.repeat(rows)


def _logits(model: nn.Module, at: At | None, **inputs: Any) -> Tensor:
    """Logits (M, V) at rows and columns counted from the end (-1 the last); all that the model gives if None."""
    output_layer = unwrap(model).get_output_embeddings()  # type: ignore[operator]
    # an adapted output layer has to see which row a token belongs to
    early = type(output_layer) is nn.Linear
    gather = nullcontext() if at is None or not early else output_layer.register_forward_pre_hook(own(_Gather(at)))
    with gather:
        logits: Tensor = model(**inputs).logits
    if at is None:
        return logits
    return logits[0] if early else logits[at]


class _Gather:
    """Hook in front of the output layer: hidden states (B, keep, d) -> (1, M, d)."""

    def __init__(self, at: At) -> None:
        self.at = at

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][self.at][None],)


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model, inside a multimodal one too."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@dataclass(frozen=True)
class Reading:
    """How a model reads rows.

    Attributes:
        packed: whether the choices of a row may stand behind each other; else they are read one by one.
        length: up to how many tokens of a row that is known.
    """

    packed: bool
    length: int


_known: WeakKeyDictionary[nn.Module, Reading] = WeakKeyDictionary()


def remember_reading(model: nn.Module, packed: bool, length: int) -> None:
    """Take over what another process has found out of the same model, up to rows of this length."""
    _known.setdefault(base_model(model), Reading(packed, length))


def reads_packed(model: nn.Module, batch: Batch) -> bool:
    """Whether these rows can be read packed; tried where the model has not met rows of their length.

    Raises:
        UserError: the model reads a row otherwise when others stand beside it.
    """
    known = _known.get(base_model(model))
    # rows behind a prefix were whole rows when they were tried; what images need is checked by `Scorer`; a head's rows
    # are under Transformers' own mask
    if (
        batch.prefix is not None
        or batch.images is not None
        or batch.input_ids.is_meta
        or sequence_classifier(model) is not None
    ):
        return True
    length = batch.input_ids.shape[1]
    if known is None or (known.packed and length > known.length):
        row = batch.segments[:, -length:].ge(0).sum(dim=1).argmax()
        found = _tried(model, batch.input_ids[row][batch.segments[row] >= 0], length)
        if found is None:  # nothing can be told now; of a model without numbers what follows says so
            return True
        known = _known[base_model(model)] = found
    return known.packed


_apart: WeakSet[nn.Module] = WeakSet()  # heads whose rows say beside padding what they say alone


@torch.no_grad()
def require_unread_padding(model: nn.Module, alone: Sequence[dict[str, Tensor]], together: dict[str, Tensor]) -> None:
    """Refuse a head that reads a row otherwise where padding stands behind it; tried once.

    Args:
        model: a sequence classifier.
        alone: keywords of its forward pass for each of a few rows of unlike lengths, without padding.
        together: for all of them as one batch.

    Raises:
        UserError: it does, as one of convolutions, of mixing without a mask, or that reads the last column.
    """
    base = base_model(model)
    if base in _apart:
        return
    inner = unwrap(model)
    with eval_mode(inner), mean_of_any(inner):
        try:
            expected = torch.cat([inner(**inputs).logits for inputs in alone])
            found = inner(**together).logits
        except torch.OutOfMemoryError:
            raise
        except Exception:  # among particles that these rows cannot carry, or whatever the passes to come will say
            return
    if not expected.isfinite().all():
        return
    if not (off := gap(found, expected)) <= REFUSED * tolerance(model):
        raise UserError(
            f"A {type(base).__name__} reads a text otherwise where padding stands behind it (its logits differ by "
            f"{off:.2g} of their spread), so that answers would depend on the rows beside; give another base model."
        )
    _apart.add(base)


@torch.no_grad()
def _tried(model: nn.Module, tokens: Tensor, length: int) -> Reading | None:
    model = unwrap(model)  # a pass through DistributedDataParallel waits for the other ranks, which may not try
    size = max(LEAST, 1 << (length - 1).bit_length())  # rounded up, so that it is tried seldom
    room = learnt_positions(model)
    if room is not None and length > room:
        raise UserError(
            f"A row has {length:,} tokens, more than the {room:,} that the model has positions for; give shorter rows "
            f"(--max-length {room})."
        )
    batch = _rows(tokens, size if room is None else min(size, max(room, LEAST)))
    with eval_mode(model), mean_of_any(model):
        try:
            # the shorter row first: rotary frequencies that a long row has changed stay so in older Transformers
            alone = torch.cat([_alone(model, batch, row) for row in reversed(range(len(batch)))][::-1]).float()
        except UserError:  # among a method's particles, which these rows cannot carry
            return None
        rows, columns = (batch.segments > 0).nonzero(as_tuple=True)
        if not alone.isfinite().all():
            return None
        _require_shared(model, batch.input_ids[:1])
        off = _off(model, batch, (rows, columns), alone)
        if off <= tolerance(model):
            return Reading(True, size)
        # the same passes as alone but for their batch: what they differ by is rounding
        own_gap = gap(plain_logits(model, batch, (rows, columns)), alone)
    if not own_gap <= REFUSED * tolerance(model):
        raise UserError(
            f"This model reads a row of {size} tokens otherwise when others stand beside it (its logits differ by "
            f"{own_gap:.2g} of their spread); give shorter rows (--max-length), or another base "
            "model."
        )
    return Reading(off <= ROUNDING * own_gap, size)


def _require_shared(model: nn.Module, input_ids: Tensor) -> None:
    """Refuse a model whose upper layers use keys and values of lower ones, where they find these in a cache alone."""
    if not getattr(text_config(model), "num_kv_shared_layers", 0):
        return
    plain, cached = (model(input_ids=input_ids, use_cache=use).logits for use in (False, True))
    if not gap(plain, cached) <= REFUSED * tolerance(model):
        raise UserError(
            f"Transformers {transformers.__version__} reads this model otherwise without a cache, which training and "
            "scoring have none of (its upper layers share keys and values); upgrade it "
            "(pip install --upgrade transformers)."
        )


def _off(model: nn.Module, batch: Batch, at: At, alone: Tensor) -> float:
    """How far packed logits are from those of the choices alone; infinity where the padding or another choice changes
    them, or the model takes no such mask."""
    try:
        packed = packed_logits(model, batch, at)
        # rounding hides nothing here: passes of the same shapes differ by what leaks alone
        other = batch.input_ids.flip(0).flip(1)
        changed = torch.where((batch.segments == -1) | (batch.segments == 1), other, batch.input_ids)
        leaked = packed_logits(model, replace(batch, input_ids=changed), at)
        kept = batch.segments[at] == 2
        few = tolerance(model) / (1 if getattr(model, "is_loaded_in_8bit", False) else 10)
        return gap(packed, alone) if gap(leaked[kept], packed[kept]) <= few else float("inf")
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model that takes no mask of this form, or none at all
        return float("inf")


def gap(found: Tensor, expected: Tensor) -> float:
    """How far logits (..., V) lie from others, at the position where they do most, as a share of their spread."""
    expected = expected.float()
    spread = expected.std().clamp_min(torch.finfo(torch.float32).tiny)  # of rows of padding alone there is none
    return float((found.float() - expected).square().mean(dim=-1).sqrt().max() / spread)


def _rows(tokens: Tensor, size: int) -> Batch:
    """Two rows of given tokens, repeated: one of `size` of them with two choices, one an eighth as long, padded."""
    parts = [[size // 2, size // 4, size - size // 2 - size // 4], [size // 16, size // 32, size // 32]]
    device = tokens.device
    stream = tokens.repeat(-(-2 * size // len(tokens)))
    input_ids = stream[:1].repeat(2, size)
    position_ids, segments = torch.zeros_like(input_ids), torch.full_like(input_ids, -1)
    for row, lengths in enumerate(parts):
        whole = sum(lengths)
        input_ids[row, -whole:] = stream[row : row + whole]
        segments[row, -whole:] = torch.arange(3, device=device).repeat_interleave(torch.tensor(lengths, device=device))
        position_ids[row, -whole:] = torch.cat(
            [torch.arange(lengths[0])] + [lengths[0] + torch.arange(n) for n in lengths[1:]]
        ).to(device)
    number = torch.full((2,), 2, device=device)
    return Batch(input_ids, position_ids, segments, number, number - 2, keep=size)


def _alone(model: nn.Module, batch: Batch, row: int) -> Tensor:
    """(tokens of the choices, V) what the model says of a row's choices, each alone and not padded."""
    found = []
    for choice in (1, 2):
        one = (batch.segments[row] == 0) | (batch.segments[row] == choice)
        segments = batch.segments[row : row + 1, one].clamp_max(1)
        single = replace(batch, input_ids=batch.input_ids[row : row + 1, one], segments=segments)
        rows, columns = single.segments.nonzero(as_tuple=True)
        found.append(plain_logits(model, single, (rows, columns)))
    return torch.cat(found)


def tolerance(model: nn.Module) -> float:
    """How far logits may lie from each other by rounding alone, as a share of their spread."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    quantised = getattr(base_model(model).config, "quantization_config", None) is not None
    whole = dtype.itemsize >= 4 and torch.get_float32_matmul_precision() == "highest"
    return TOLERANCE if whole and not quantised else TOLERANCE_OF_16_BITS
