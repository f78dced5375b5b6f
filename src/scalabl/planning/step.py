"""The rows that a plan is for, and a training step, a prediction and a generation of them on the meta device, with the
library's and the model's own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.planning.meta_device import DeviceKernels, LiveBytes, Use
from scalabl.planning.meta_model import autocast_dtype, hidden_size, model_dtype, storage_bytes
from scalabl.predictive.monte_carlo import first_difference
from scalabl.runs.method import load_method
from scalabl.runs.registry import SAMPLED
from scalabl.runs.settings import Settings
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.continuation import Continuation
from scalabl.scoring.reading import CACHE
from scalabl.scoring.text import EncodedText
from scalabl.scoring.trunk import Trunk, token_logits
from scalabl.tuner.projection import StochasticProjection

MOST = 2**26  # tokens at a time, which are kept as numbers: no device takes so many
LOSSES = ("letters", "continuation", "tokens", "head")


@dataclass(frozen=True)
class PlannedRows:
    """A batch of rows that are all of the greatest length.

    Args:
        batch: rows of a batch.
        length: tokens of a row.
        loss: "letters" reads the last position alone, "continuation" those that predict the choices' tokens,
            "tokens" (plain supervised fine-tuning, no task of this program) all of them, and "head" the logits of a
            classification head, one for each of `choices`.
        scored: tokens of all choices of a row together.
        choices: of a row.
        stored: bytes of the frozen layers' output for all rows of a run, which is kept; 0 where it is not known.

    Raises:
        UserError: a number is out of its range.
    """

    batch: int
    length: int
    loss: str = "continuation"
    scored: int = 32
    choices: int = 4
    stored: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}.")
        for name in ("batch", "length", "scored", "choices"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")

    @property
    def in_a_row(self) -> int:
        """Tokens of a row's choices: they stand behind a prompt of at least one token, each choice having one."""
        if self.loss != "continuation":
            return 0
        return max(1, min(self.scored, self.length - 1))

    def require_few(self, batch: int) -> None:
        """Refuse so many of these rows that their numbers would not fit into memory.

        Raises:
            UserError: they are too many.
        """
        if batch * self.length > MOST:
            raise UserError(
                f"{batch:,} rows of {self.length:,} tokens are more than a plan is made for ({MOST:,} tokens at a "
                "time); lower --batch, --seq or --samples."
            )

    def of(self, batch: int) -> Batch:
        """So many of these rows, on the CPU; the numbers in them mean nothing.

        Raises:
            UserError: they are too many.
        """
        self.require_few(batch)
        prompt = max(1, self.length - self.in_a_row)
        choices = max(1, min(self.choices, self.in_a_row))
        sizes = [self.in_a_row // choices + (i < self.in_a_row % choices) for i in range(choices)]
        segments, positions = [0] * prompt, list(range(prompt))
        for number, size in enumerate(sizes, start=1):
            segments += [number] * size
            positions += range(prompt, prompt + size)
        return Batch(
            input_ids=torch.zeros(batch, len(segments), dtype=torch.long),
            position_ids=torch.tensor([positions]).repeat(batch, 1),
            segments=torch.tensor([segments]).repeat(batch, 1),
            num_choices=torch.full((batch,), choices if self.in_a_row else self.choices),
            answers=torch.zeros(batch, dtype=torch.long),
            keep=1 + self.in_a_row,
        )


def rows_like(encoded: Sequence[Encoded], batch: int, *, head: bool = False) -> PlannedRows:
    """The batch that a run's longest rows make.

    Args:
        encoded: the longest of them, in every way in which they may be scored.
        batch: rows of a batch.
        head: whether they are scored by a classification head.
    """
    scored = max(_scored(row) for row in encoded)
    return PlannedRows(
        batch=batch,
        length=max(len(row.input_ids) for row in encoded),
        loss="head" if head else "continuation" if scored else "letters",
        scored=max(1, scored),
        choices=max(row.num_choices for row in encoded),
    )


def _scored(row: Encoded) -> int:
    """Tokens whose log-likelihoods are read: those of choices, or the trained ones of a text."""
    return row.trained if isinstance(row, EncodedText) else sum(segment > 0 for segment in row.segments)


@dataclass(frozen=True)
class MetaRun:
    """A model on the meta device, ready to be run.

    Args:
        model: adapted.
        settings: of its training.
        device: "cpu" or "cuda", whose kernels are meant.
        trunk: its lower layers.
        start: the lowest decoder layer in which particles differ, None where nothing is stochastic.
    """

    model: PeftModel
    settings: Settings
    device: str
    trunk: Trunk
    start: int | None

    @classmethod
    def of(cls, model: PeftModel, settings: Settings, device: str) -> Self:
        """As the model is adapted."""
        for leaf in (x for x in model.modules() if isinstance(x, StochasticProjection)):
            _ = leaf.weight  # what it keeps from its first use on is no step's
        return cls(model, settings, device, Trunk(model), first_difference(model, None))

    def training_step(self, rows: PlannedRows, batch: int) -> tuple[Use, Use]:
        """The forward pass of one training step, whose kept bytes are inputs and activations, and the whole step."""
        self.model.train()
        # checkpointing has every layer's backward pass run, so that a run stores nothing then
        trunk = None if self.settings.optimisation.gradient_checkpointing else self.trunk
        inputs = rows.of(batch)
        with self._live() as live, DeviceKernels(self.device, autocast_dtype(self.settings, self.device)):
            on_meta = inputs.to("meta")
            if trunk is not None and trunk.depth and rows.loss != "tokens":
                shape = (*on_meta.input_ids.shape, hidden_size(self.model))
                on_meta.trunk = torch.empty(shape, dtype=model_dtype(self.model), device="meta")
            loss = training_loss(self.model, inputs, on_meta, trunk, rows)
            forward = live.use()
            loss.backward()
            whole = live.use()
        self.model.zero_grad(set_to_none=True)
        return forward, whole

    @torch.no_grad()
    def prediction(self, rows: PlannedRows, batch: int, samples: int) -> Use:
        """The average over N particles, all at once: N B rows; B rows where a method draws none, or N is 0."""
        self.model.eval()
        inputs, particles = rows.of(batch), particles_of(self.settings.method, samples)
        rows.require_few(particles * batch)
        if rows.loss == "tokens":
            inputs = replace(inputs, keep=rows.length)
        with self._live() as live, DeviceKernels(self.device):
            on_meta = inputs.to("meta")
            start = self.trunk.depth if self.start is None else self.start
            if start:
                hidden = self.trunk.encode(self.model, on_meta, start)
                on_meta = replace(on_meta, trunk=hidden, start=start)
                del hidden
            if particles > 1:
                on_meta, inputs = on_meta.repeat(particles), inputs.repeat(particles)
            drawn = load_method(self.settings.method).empty_particles(self.model, samples) if samples else nullcontext()
            with drawn:
                _log_probs(self.model, inputs, on_meta, self.trunk, rows)
        return live.use()

    @torch.no_grad()
    def key_value_cache(self, length: int) -> int:
        """Bytes of the keys and values of one row of a length, as generation keeps them."""
        self.model.eval()
        with self._live(), DeviceKernels(self.device):
            ids = torch.zeros(1, length, dtype=torch.long, device="meta")
            cache = getattr(self.model(input_ids=ids, use_cache=True, logits_to_keep=1), CACHE)
            return storage_bytes(t for layer in getattr(cache, "layers", ()) for t in vars(layer).values() if _is(t))

    def _live(self) -> LiveBytes:
        return LiveBytes([*self.model.parameters(), *self.model.buffers()])


def particles_of(method: str, samples: int) -> int:
    """How many rows a question takes while a method predicts with N samples."""
    return max(1, samples) if method in SAMPLED else 1


def training_loss(model: Any, inputs: Batch, on_meta: Batch, trunk: Trunk | None, rows: PlannedRows) -> Tensor:
    """The loss of a batch; `inputs` are its numbers, `on_meta` the same batch where the model is."""
    if rows.loss == "tokens":
        loss: Tensor = model(input_ids=on_meta.input_ids, labels=on_meta.input_ids, use_cache=False).loss
        return loss
    return F.cross_entropy(_class_logits(model, inputs, on_meta, trunk, rows), on_meta.answers)


def _log_probs(model: Any, inputs: Batch, on_meta: Batch, trunk: Trunk | None, rows: PlannedRows) -> Tensor:
    if rows.loss == "tokens":
        return token_logits(model, on_meta, trunk).float().log_softmax(dim=-1)
    return _class_logits(model, inputs, on_meta, trunk, rows).log_softmax(dim=-1)


def _class_logits(model: Any, inputs: Batch, on_meta: Batch, trunk: Trunk | None, rows: PlannedRows) -> Tensor:
    """(B, C), as the scorings make them; which positions they read is decided on the CPU, where numbers are known."""
    if rows.loss == "head":
        return token_logits(model, on_meta, trunk).float()
    if rows.loss == "letters":
        number, last = len(inputs), inputs.input_ids.shape[1] - 1
        at = torch.arange(number), torch.full((number,), last)
        return token_logits(model, on_meta, trunk, at)[:, torch.arange(rows.choices)].float()
    scoring = Continuation(None, normalization="token")  # type: ignore[arg-type]  # encodes nothing here
    logits = token_logits(model, on_meta, trunk, scoring.positions(inputs))
    return scoring.class_logits(logits, replace(inputs, input_ids=on_meta.input_ids))


def _is(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta
