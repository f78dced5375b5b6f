"""The memory and the operations that a training will take, before any of its weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from scalabl.core.errors import UserError, first_line
from scalabl.planning.meta_model import (
    Counts,
    build,
    compute_dtype,
    hidden_size,
    layer_kinds,
    model_dtype,
    optimizer_bytes,
    over_depth,
)
from scalabl.planning.step import MOST, MetaRun, PlannedRows, particles_of
from scalabl.runs.method import load_method
from scalabl.runs.models import read_config
from scalabl.runs.registry import METHODS
from scalabl.runs.settings import Settings
from scalabl.training.refusals import require_known
from scalabl.tuner.layers import decoder_layers

LARGEST = 8192  # rows, above which no larger batch is looked for
_LINES = 8  # tries along a straight line; where it is none, halves find the rest


class CannotPlanError(UserError):
    """What a step takes depends on numbers, so that it cannot be run without any."""


@dataclass(frozen=True)
class StepUse:
    """Bytes and operations of a training step, or of the prediction of a batch.

    Attributes:
        activations: bytes of a batch and of what autograd saves of it for the backward pass; of a prediction, of the
            batch and its hidden states when most is used.
        peak: bytes of all that there is when most is used; for a training weights, adapter, gradients, optimiser,
            stored rows, activations and `temporary`, for a prediction weights, adapter and activations.
        flops: operations of a forward and a backward pass, recomputation included; of a prediction's particles.
        temporary: bytes of a training beyond the other parts of its peak.
    """

    activations: int
    peak: int
    flops: int
    temporary: int = 0


class Planner:
    """Asks one training's model, on the meta device, what it takes at any number of rows.

    Args:
        settings: what is to be trained.
        device: "cpu" or "cuda".
        config: of the base model; read by its name if None.
        labels: of its classification head; None for a language model.

    Attributes:
        counts: of parameters, and the bytes of what stays.
        optimizer: bytes of the optimiser's states.
        dtype: the model's precision, by name.

    Raises:
        UserError: the model, or the adapter on it, is not one that can be trained.
        CannotPlanError: here or later: a step of it cannot be run without numbers.
    """

    def __init__(
        self, settings: Settings, device: str, config: PretrainedConfig | None = None, labels: int | None = None
    ) -> None:
        method = load_method(settings.method)
        if not METHODS[settings.method].plannable:
            raise CannotPlanError(
                f"What {settings.method} takes depends on the numbers that it draws and cannot be planned."
            )
        self.settings = settings
        self.device = device
        config = read_config(settings.model) if config is None else config
        model, self.counts = build(settings, config, device, labels)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if method.optimizer_numbers is None:
            self.optimizer = optimizer_bytes(settings.optimisation.optimizer, trained)
        else:
            self.optimizer = 4 * method.optimizer_numbers * sum(parameter.numel() for parameter in trained)
        self.dtype = str(compute_dtype(settings, device)).removeprefix("torch.")
        self._run = MetaRun.of(model, settings, device)
        self._layers = decoder_layers(model)
        types = getattr(config.get_text_config(), "layer_types", None)
        marks = (self._run.trunk.depth, self._run.trunk.depth if self._run.start is None else self._run.start)
        self._kinds = layer_kinds(self._layers, types, marks)

    @property
    def stores_rows(self) -> bool:
        """Whether a run keeps what the layers below all adapters give for its rows."""
        return self._run.trunk.depth > 0 and not self.settings.optimisation.gradient_checkpointing

    @property
    def bytes_per_token(self) -> int:
        """Of a hidden state."""
        return hidden_size(self._run.model) * model_dtype(self._run.model).itemsize

    def training(self, rows: PlannedRows, batch: int | None = None) -> StepUse:
        """A training step of these rows, or of another number of them."""
        size = rows.batch if batch is None else batch

        def measure() -> tuple[int, ...]:
            forward, whole = self._run.training_step(rows, size)
            return forward.kept, whole.peak, whole.flops

        activations, step, flops = self._over_depth(measure)
        counts = self.counts
        staying = counts.weights + counts.adapter + self.optimizer + rows.stored
        # in a very small batch the gradients of all layers are more than what is saved of one
        step = max(step, counts.gradients)
        return StepUse(activations, staying + step, flops, temporary=step - activations - counts.gradients)

    def prediction(self, rows: PlannedRows, samples: int, batch: int | None = None) -> StepUse:
        """A prediction with N particles at once."""
        size = rows.batch if batch is None else batch

        def measure() -> tuple[int, ...]:
            use = self._run.prediction(rows, size, samples)
            return use.peak, use.flops

        activations, flops = self._over_depth(measure)
        return StepUse(activations, self.counts.weights + self.counts.adapter + activations, flops)

    def key_value_cache(self, length: int) -> int:
        """Bytes of the keys and values of one row."""
        return self._over_depth(lambda: (self._run.key_value_cache(length),))[0]

    def _over_depth(self, measure: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        try:
            return over_depth(self._layers, self._kinds, measure)
        except (RuntimeError, NotImplementedError, TypeError) as error:  # an operation that asks for numbers
            why = first_line(error)
            raise CannotPlanError(f"The memory of {self.settings.model} cannot be planned: {why}") from error


def largest_batch(card: int, peak: Callable[[int], int], most: int = LARGEST) -> int:
    """The most rows whose peak is no more than a card has; 0 where not even one fits, at most `most`.

    Args:
        card: bytes.
        peak: bytes of a batch, which grow with it, nearly linearly.
        most: rows, above which none is tried.
    """
    fits, over = 0, most + 1
    tried = 1
    known: dict[int, int] = {}
    while over - fits > 1:
        known[tried] = peak(tried)
        if known[tried] <= card:
            fits = tried
        else:
            over = tried
        points = sorted(known.items(), key=lambda point: abs(point[1] - card))[:2]
        if len(points) < 2:
            tried = 2
        elif len(known) < _LINES:
            (one, of_one), (other, of_other) = points
            slope = (of_one - of_other) / (one - other)
            tried = one + int((card - of_one) // slope) if slope > 0 else over - 1
        else:
            tried = (fits + over) // 2
        tried = min(max(tried, fits + 1), over - 1)
    return fits


@dataclass(frozen=True)
class Plan:
    """What a training takes.

    Attributes:
        settings, rows: what is planned.
        device, dtype: where, and in which precision.
        card: bytes that there are.
        samples: N of the predictions.
        counts, optimizer: as `Planner` has them.
        training: a step, with `gradient_checkpointing` False and True.
        prediction: with N particles, and with the mean alone.
        cache: bytes of the keys and values of all particles of a batch; 0 of a classification head, which generates
            nothing.
        largest: rows of the largest batch that fits the card: training (without, with checkpointing), prediction.
    """

    settings: Settings
    rows: PlannedRows
    device: str
    dtype: str
    card: int
    samples: int
    counts: Counts
    optimizer: int
    training: dict[bool, StepUse]
    prediction: dict[int, StepUse]
    cache: int
    largest: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of the training."""
        return self.training[self.settings.optimisation.gradient_checkpointing].peak

    @property
    def particles(self) -> int:
        """Rows that a question takes in a prediction."""
        return particles_of(self.settings.method, self.samples)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        drawn, mean = self.prediction[self.samples], self.prediction[0]
        steps = {
            f"{name}{suffix}": getattr(self.training[on], own)
            for name, own in (("activations", "activations"), ("temporary", "temporary"), ("training_peak", "peak"))
            for on, suffix in ((False, ""), (True, "_checkpointed"))
        }
        return {
            "recipe": self.settings.as_dict(),
            "device": self.device,
            "dtype": self.dtype,
            "batch": self.rows.batch,
            "sequence": self.rows.length,
            "loss": self.rows.loss,
            "scored_tokens": self.rows.in_a_row,
            "samples": self.samples,
            "base_parameters": self.counts.base,
            "lora_parameters": self.counts.lora,
            "variational_parameters": self.counts.variational,
            "bytes": {
                "weights": self.counts.weights,
                "adapter": self.counts.adapter,
                "gradients": self.counts.gradients,
                "optimizer": self.optimizer,
                "stored_rows": self.rows.stored,
                **steps,
                "prediction_activations": drawn.activations,
                "prediction_activations_mean": mean.activations,
                "prediction_peak": drawn.peak,
                "prediction_peak_mean": mean.peak,
                "key_value_cache": self.cache,
            },
            "flops": {
                "training_step": self.training[False].flops,
                "training_step_checkpointed": self.training[True].flops,
                "prediction": drawn.flops,
                "prediction_mean": mean.flops,
            },
            "card": self.card,
            "fits": self.peak <= self.card,
            "largest_batch": self.largest,
        }


def make_plan(settings: Settings, rows: PlannedRows, *, device: str, card: int, samples: int = 10) -> Plan:
    """Everything about a training, from its model's configuration alone.

    Args:
        settings: what is to be trained.
        rows: what its batches are like.
        device: "cpu" or "cuda".
        card: bytes that there are.
        samples: N of predictions.

    Raises:
        UserError: as `Planner`; or a number is out of its range.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1.")
    require_known(settings.optimisation.optimizer)
    config = read_config(settings.model)
    labels = rows.choices if rows.loss == "head" else None
    planners = {
        on: Planner(settings.changed(gradient_checkpointing=on), device, config, labels) for on in (False, True)
    }
    plain = planners[False]
    most = max(1, min(LARGEST, MOST // rows.length))
    drawn = max(1, min(LARGEST, MOST // (rows.length * particles_of(settings.method, samples))))
    return Plan(
        settings=settings,
        rows=rows,
        device=device,
        dtype=plain.dtype,
        card=card,
        samples=samples,
        counts=plain.counts,
        optimizer=plain.optimizer,
        training={on: planner.training(rows) for on, planner in planners.items()},
        prediction={number: plain.prediction(rows, number) for number in (samples, 0)},
        cache=0
        if labels is not None
        else rows.batch * particles_of(settings.method, samples) * plain.key_value_cache(rows.length),
        largest={
            "training": largest_batch(card, lambda batch: plain.training(rows, batch).peak, most),
            "training_checkpointed": largest_batch(card, lambda batch: planners[True].training(rows, batch).peak, most),
            "prediction": largest_batch(card, lambda batch: plain.prediction(rows, samples, batch).peak, drawn),
        },
    )
