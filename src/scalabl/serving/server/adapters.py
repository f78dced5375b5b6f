"""The adapters of a server, by the names that requests have for them, on one base whose weights are there once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from scalabl.core.errors import UserError
from scalabl.generation.confidence import Confidence
from scalabl.generation.fan_out import Draws
from scalabl.generation.generate import draws_of, fitted_confidence
from scalabl.inference.predictor import Predictor
from scalabl.inference.settings import PredictionSettings
from scalabl.inference.thresholds import describe
from scalabl.predictive.auto import AutoPredictive
from scalabl.runs.directory import find_base
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run
from scalabl.runs.record import CHOICES, HEAD, RunRecord
from scalabl.tuner.threads import base_model


@dataclass(frozen=True)
class ServedAdapter:
    """One adapter and what it can be asked.

    Attributes:
        name: by which requests ask for it.
        run: the loaded run.
        predictor: gives rows their labels; None of a run that was trained on rows of text.
        draws: the particles that texts are averaged over; None of a classification head, which writes none.
        confidence: of its texts, where one was fitted.
    """

    name: str
    run: Run
    predictor: Predictor | None
    draws: Draws | None
    confidence: Confidence | None = None

    @property
    def sentence(self) -> str:
        """What it can be asked, in words, and the thresholds that its answers keep."""
        asked = [*([] if self.predictor is None else ["labels"]), *([] if self.draws is None else ["texts"])]
        parts = [" and ".join(asked)]
        if self.predictor is not None:
            parts += [self.predictor.name, *describe(self.predictor.settings)]
        return "; ".join(parts)

    def facts(self) -> dict[str, Any]:
        """What `GET /v1/models` says of it beside OpenAI's own fields."""
        record, predictor = self.run.record, self.predictor
        known: dict[str, Any] = {
            "method": record.method,
            "classifies": predictor is not None,
            "writes": self.draws is not None,
            "chat": self.draws is not None and bool(getattr(self.run.tokenizer, "chat_template", None)),
        }
        if predictor is not None:
            labels = record.labels
            known |= {
                "labels": None if labels is None else list(labels),
                "several": record.several,
                "predictive": predictor.name,
                "thresholds": describe(predictor.settings),
            }
        return known


def load_adapters(
    directories: Mapping[str, Path],
    records: Mapping[str, RunRecord],
    settings: Mapping[str, PredictionSettings],
    *,
    samples: int = 10,
    seed: int = 0,
    batch_size: int = 16,
    model: str | None = None,
) -> dict[str, ServedAdapter]:
    """Load adapters, and choose once what is chosen once: auto's predictive, and all thresholds.

    Args:
        directories: of finished runs, by name.
        records: what their files say.
        settings: of those that give labels.
        samples: N particles of texts; 0 is the posterior mean.
        seed: of these particles.
        batch_size: rows at a time.
        model: the base model, if it has moved.

    Raises:
        UserError: adapters on different bases, or as `scalabl.runs.loading.load_run` and `Predictor.resolve`.
    """
    require_one_base(directories, records, model)
    held: dict[str, nn.Parameter] = {}
    made = {}
    for name, directory in directories.items():
        classifies = records[name].kind == CHOICES
        run = load_run(directory, model=model, generating=not classifies)
        share_weights(run.model, held)
        predictor = Predictor(run, settings[name], batch_size=batch_size, over_ranks=False) if classifies else None
        if predictor is not None:
            _resolve(predictor, name)
        writes = run.record.scoring.get("scoring") != HEAD
        made[name] = ServedAdapter(
            name, run, predictor, draws_of(run, samples, seed) if writes else None,
            fitted_confidence(run) if writes else None,
        )  # fmt: skip
    return made


def _resolve(predictor: Predictor, name: str) -> None:
    chooses = isinstance(predictor.strategy, AutoPredictive)
    try:
        predictor.resolve()
    except UserError as error:
        if not chooses or predictor.settings.has_promise:
            raise
        raise UserError(
            f"The predictive of {name} is chosen on the run's held-out rows, which are not to be had; name one with "
            f"--predictive mc, linearized or mean: {error}"
        ) from error


def require_one_base(directories: Mapping[str, Path], records: Mapping[str, RunRecord], model: str | None) -> None:
    """Refuse adapters that are not on one base model in one precision, before it is loaded.

    Raises:
        UserError: two of them differ.
    """
    bases = {}
    for name, directory in directories.items():
        record = records[name]
        place = model or find_base(record.model, directory)
        bases[name] = (place, *(record.recipe[key] for key in ("dtype", "bits", "quantization")))
    first, *others = bases
    for name in others:
        if bases[name] != bases[first]:
            here, there = (" ".join(str(part) for part in bases[each] if part is not None) for each in (first, name))
            raise UserError(
                f"A server has one base model, but {first} is on {here} and {name} on {there}; start a server for each."
            )


def share_weights(model: nn.Module, held: dict[str, nn.Parameter]) -> None:
    """Let a model have the weights of its base from those that are held already, where they are equal to the last bit.

    Args:
        model: a base model with its adapter.
        held: the base's parameters by name; those that are new are put in.
    """
    base: Any = base_model(model)
    known: dict[int, nn.Parameter] = {}  # of tied weights: what was put in the place of a parameter
    for path, module in base.named_modules():
        if "lora_" in path:
            continue
        place = path.removeprefix(f"{base.base_model_prefix}.").removesuffix(".base_layer")
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            other = known.get(id(parameter)) or held.setdefault(f"{place}.{name}", parameter)
            if other is not parameter and _equal(other, parameter):
                known[id(parameter)] = module._parameters[name] = other


def _equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    alike = type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
    return alike and one.device == other.device and bool((one == other).all())
