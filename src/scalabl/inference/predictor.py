"""A finished run under its settings: rows in, log class probabilities or answers out.

The one way from rows to predictions: `evaluate`, `predict`, `acquire`, `Classifier` and the workers of batch scoring
go through it. In another process, `Predictor.load(directory, settings)` with the settings that `resolve` returned
answers alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from scalabl.core import processes
from scalabl.core.console import progress_bar
from scalabl.core.errors import UserError
from scalabl.data.class_balance import prior_ratios
from scalabl.data.example import Example
from scalabl.inference.answer import likeliest, those_above_half
from scalabl.inference.calibration import Calibration, calibration_for
from scalabl.inference.promise import held_out_rows
from scalabl.inference.settings import PredictionSettings, refuse_of_one_label
from scalabl.inference.thresholds import lacks_threshold, reasons_of, sets_under, with_thresholds
from scalabl.inference.variance import as_top_layers
from scalabl.metrics.selective import confidence_score
from scalabl.metrics.several_labels import label_probs
from scalabl.metrics.uncertainty import apply_priors, apply_temperature, decompose, particles_used
from scalabl.predictive.adaptive import AdaptivePredictive, with_sampling
from scalabl.predictive.auto import AutoPredictive, with_scale
from scalabl.predictive.base import Predictive, predict
from scalabl.predictive.linearized import LinearizedPredictive
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_post_hoc
from scalabl.runs.record import RunRecord
from scalabl.runs.registry import METHODS
from scalabl.runs.stock import Asked
from scalabl.scoring.base import Encoded
from scalabl.scoring.features import MeanPass
from scalabl.scoring.prefix import SharedPrefix, shared_prefix
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.tuner.threads import alone

T = TypeVar("T")


class Predictable(Protocol):
    """What a `Predictor` needs of a run; names, promises and post-hoc methods need a whole `Run`."""

    scorer: Scorer

    @property
    def is_bayesian(self) -> bool: ...

    def predictive(
        self, name: str | None = None, *, samples: int = 10, seed: int = 0, stochastic_layers: str | None = None
    ) -> Predictive: ...

    def encode(self, rows: list[Example]) -> list[Encoded]: ...


class Predictor:
    """A loaded run that predicts by its settings.

    Args:
        run: the run.
        settings: what decides its predictions; resolved by this process, by another, or not at all.
        batch_size: rows at a time; the answers do not depend on it.
        over_ranks: split the work over the processes of one command, all of which make the same calls.

    Attributes:
        given: the settings as given.
        settings: "variance:0.9" is resolved to "last:K" and a calibrated run's numbers are put in at once,
            and `resolve` does the rest.
        calibration: the run's own where it is predicted by it; None where it is uncalibrated or left out.
        strategy: the predictive that they name.
        prior_ratios: (C,) other priors over those of the training rows, where the settings have such.
        distance: to the run's training rows; None for a run that keeps no features of them.
        prefix: what all rows begin with, for calls that see a few of them at a time; `keep_prefix` sets it.

    Raises:
        UserError: settings that the run does not have; the file of its features was lost or altered.
    """

    def __init__(
        self,
        run: Predictable,
        settings: PredictionSettings | None = None,
        *,
        batch_size: int = 8,
        over_ranks: bool = True,
    ) -> None:
        self.run = run
        self.given = self.settings = settings or PredictionSettings()
        self.batch_size = batch_size
        self.over_ranks = over_ranks
        self.prefix: SharedPrefix | None = None
        if self.per_row > 1:
            s = self.settings
            refuse_of_one_label(adaptive=s.is_adaptive, priors=s.priors, coverage=s.coverage)
        spec = self.settings.stochastic_layers
        if spec is not None and run.is_bayesian and self.settings.predictive != "mean":
            layers = self._once(lambda: as_top_layers(self.whole_run(), spec))
            self.settings = replace(self.settings, stochastic_layers=layers)
        self.strategy = make_strategy(run, self.settings)
        self.distance = run.distance if isinstance(run, Run) else None
        priors = self.settings.priors
        self.prior_ratios = None if priors is None else priors_over_training(self.whole_run().record, priors)
        self.calibration = calibration_for(getattr(run, "record", None), self.settings)
        if self.calibration is not None:
            self._calibrate(self.calibration)

    def _calibrate(self, calibration: Calibration) -> None:
        is_auto = isinstance(self.strategy, AutoPredictive)
        if is_auto and calibration.scale > 0 and self.settings.stochastic_layers is None:
            if calibration.suits_auto:
                self.strategy = with_scale(self.strategy, calibration.scale)  # it chooses under tau; T is of its choice
                return
            self.settings = replace(self.settings, predictive=calibration.predictive, why=calibration.why_not_auto)
            self.strategy, is_auto = make_strategy(self.run, self.settings), False
        kind = "mean" if is_auto and calibration.scale == 0 else kind_of(self.strategy)
        self.settings = calibration.applied(self.settings, kind)
        self.strategy = make_strategy(self.run, self.settings)
        if self.settings.temperature is None:
            self.calibration = None

    def take(self, strategy: Predictive) -> None:
        """Predict by another strategy, for which the run was not calibrated."""
        if self.calibration is not None:
            self.settings = replace(self.settings, scale=None, temperature=None)
            self.calibration = None
        self.strategy = strategy

    def as_learnt(self) -> Predictor:
        """The same without the run's calibration: tau = T = 1. Where tau is another, auto chooses anew: what it took
        was under that."""
        same = self.calibration is None or self.calibration.scale == 1
        settings = replace(self.settings, scale=None, temperature=None, raw=True)
        if not same:
            given = self.given
            settings = replace(
                settings, predictive=given.predictive, stochastic_layers=given.stochastic_layers,
                feature_variance=given.feature_variance, chosen=given.chosen, why=given.why,
            )  # fmt: skip
        return Predictor(self.run, settings, batch_size=self.batch_size, over_ranks=self.over_ranks)

    @classmethod
    def load(
        cls,
        directory: Path,
        settings: PredictionSettings | None = None,
        *,
        model: str | None = None,
        batch_size: int = 8,
        asked: Asked | None = None,
    ) -> Predictor:
        """Of a finished run's directory.

        Args:
            directory: made by `scalabl train`, or an adapter that another trainer saved.
            settings: as above.
            model: the base model, if it has moved since.
            batch_size: as above.
            asked: how the rows of an adapter without a record are scored.

        Raises:
            UserError: not a finished run, altered files, another base model, settings that the run does not have.
        """
        return cls(load_run(directory, model=model, asked=asked), settings, batch_size=batch_size)

    @property
    def per_row(self) -> int:
        """Questions of a row: C where it may have several of C labels, else 1."""
        return self.run.scorer.scoring.per_row

    @property
    def name(self) -> str:
        """As in a table: "ScalaBL, N = 10"; with a post-hoc method, its title."""
        return describe_method(self.whole_run(), self.strategy, self.settings.method)

    def whole_run(self) -> Run:
        """The run with its record.

        Raises:
            UserError: an adapter without one.
        """
        if not isinstance(self.run, Run):
            raise UserError("This adapter has no record of its training; load the directory of a run.")
        return self.run

    def resolve(self, rows: Sequence[Example] | None = None) -> PredictionSettings:
        """Choose what is chosen once for these rows and those to come: auto's predictive, and the thresholds of what is
        promised, of scope and of sets, from the run's held-out rows.

        What was resolved before stays. In several processes the main one chooses.

        Args:
            rows: what auto is chosen for; None takes the run's held-out rows.

        Returns:
            the settings with all that was chosen, under which another process answers alike.

        Raises:
            UserError: rows that the run cannot encode, or the run's held-out rows cannot be had.
        """
        with alone(self.run.scorer.model):
            if isinstance(self.strategy, AutoPredictive):
                rows = held_out_rows(self.whole_run().record) if rows is None else rows
                self._choose(self.strategy, self.run.encode(list(rows)))
            if lacks_threshold(self.settings):
                record = self.whole_run().record
                held_out = held_out_rows(record)
                log_probs, labels = self.log_probs(held_out, dataset="held-out rows"), labels_of(held_out)

                def of_mean() -> dict[str, Tensor]:
                    return self.mean_scores(held_out, dataset="held-out rows")

                self.settings = with_thresholds(
                    self.settings, record, held_out, labels, log_probs, of_mean, self.per_row
                )
            return self.settings

    def _choose(self, auto: AutoPredictive, encoded: Sequence[Encoded]) -> None:
        def choice() -> tuple[str, str | None, float | None, str]:
            with progress_bar() as progress:
                progress.add_task("choosing a predictive", total=None, detail="")
                made: Any = auto.chosen(self.run.scorer, encoded, batch_size=self.batch_size)
            assert auto.choice is not None
            features = getattr(made, "feature_variance", None)
            return made.name, made.stochastic_layers, features, auto.choice.sentence

        name, layers, features, why = self._once(choice)
        why = why if self.settings.why is None else f"{why} {self.settings.why}"
        self.strategy = auto.made(name, layers, features)
        self.settings = replace(
            self.settings,
            predictive=name,
            stochastic_layers=layers,
            feature_variance=features,
            chosen=self.name,
            why=why,
        )
        if self.calibration is not None:
            self.settings = self.calibration.applied(self.settings, kind_of(self.strategy), by_auto=True)

    def _once(self, work: Callable[[], T]) -> T:
        return processes.on_main(work) if self.over_ranks else work()

    def keep_prefix(self, encoded: Sequence[Encoded]) -> None:
        """Encode what all these rows begin with once for every later call, where the strategy has use for it."""
        if getattr(self.strategy, "shares_prefix", False):
            self.prefix = shared_prefix(self.run.scorer, encoded)

    def log_probs(
        self, rows: Sequence[Example], encoded: Sequence[Encoded] | None = None, *, dataset: str | None = None
    ) -> Tensor:
        """(N, n, C) log class probabilities of n rows, (N, n C, 2) where they may have several of C labels: no and yes
        of each; several processes share the work and all get them.

        Args:
            rows: n questions.
            encoded: the same as tokens, where they were encoded before.
            dataset: the progress bar's words for rows that will be predicted again, by other runs and settings: what
                the frozen layers make of them is kept on disk. None for rows that come once, without a bar.

        Raises:
            UserError: rows that the run's scoring cannot encode.
        """
        scorer, batch_size = self.run.scorer, self.batch_size
        with alone(scorer.model):
            if dataset is not None:
                log_probs = log_probabilities(
                    self.run, rows, self.strategy, batch_size=batch_size, description=dataset,
                    over_ranks=self.over_ranks, encoded=encoded,
                )  # fmt: skip
            else:
                encoded = self.run.encode(list(rows)) if encoded is None else encoded
                log_probs = predict(
                    scorer, encoded, self.strategy, batch_size=batch_size, prefix=self.prefix,
                    over_ranks=self.over_ranks,
                )  # fmt: skip
            temperature = self._temperature()
        log_probs = scorer.scoring.likelihood.questions(log_probs)
        if temperature != 1:
            log_probs = apply_temperature(log_probs, temperature)
        # behind the temperature, which is of the training rows' priors
        return log_probs if self.prior_ratios is None else apply_priors(log_probs, self.prior_ratios)

    def _temperature(self) -> float:
        """T of what was predicted last, beside what its particles have already."""
        if isinstance(self.strategy, AdaptivePredictive):
            return 1.0
        settings = self.settings
        if self.calibration is not None and isinstance(self.strategy, AutoPredictive):
            settings = self.calibration.applied(settings, kind_of(self.strategy), by_auto=True)
        return settings.temperature or 1.0

    def answers(self, rows: Sequence[Example], encoded: Sequence[Encoded] | None = None) -> Iterator[dict[str, Any]]:
        """One answer a row: id, text, label, probs (choice -> probability), confidence, entropy, aleatoric, epistemic
        (nats). Where the label is None, `guess` is what it would have been.

        Of a row that may have several labels `labels`, those whose probability is above 1/2; the confidence is the
        probability that none of them is wrong or missing, were they independent, and the entropies are sums over
        labels, each for itself.

        Where the run keeps its features, `distance`; where a coverage is asked for, `set`, None where it has every
        label; where a label may be None `reason`, why it is: "out of scope", "unsure" (abstain) or "promise".
        Under adaptive N also `particles`, how many the answer is averaged over; where auto chose, `predictive`; of a
        row that was cut, `truncated`.

        Args:
            rows: n questions.
            encoded: the same as tokens, where they were encoded before.
        """
        encoded = self.run.encode(list(rows)) if encoded is None else encoded
        log_probs = self.log_probs(rows, encoded)
        several = self.per_row > 1
        probs, uncertainty = label_probs(log_probs, self.per_row), decompose(log_probs, self.per_row)
        sure, used = confidence_score(log_probs, per_row=self.per_row), particles_used(log_probs)
        settings = self.settings
        of_mean = self.mean_scores(rows, encoded) if self.needs_mean_pass else {}
        reasons = reasons_of(settings, log_probs, of_mean, self.per_row)
        sets = sets_under(settings, probs, rows)
        for i, row in enumerate(rows):
            of_row = probs[i, : len(row.choices)].tolist()
            given: Any = those_above_half(row, of_row) if several else likeliest(row, of_row)
            yield {
                "id": row.id,
                "text": row.text,
                "labels" if several else "label": given if reasons[i] is None else None,
                **({} if reasons[i] is None else {"guess": given}),
                "probs": dict(zip(row.choices, of_row, strict=True)),
                "confidence": float(sure[i]),
                "entropy": uncertainty.total[i].item(),
                "aleatoric": uncertainty.aleatoric[i].item(),
                "epistemic": uncertainty.epistemic[i].item(),
                **{name: values[i].item() for name, values in of_mean.items()},
                **({} if sets is None else {"set": sets[i]}),
                **({"reason": reasons[i]} if settings.may_abstain else {}),
                **({"particles": int(used[i])} if self.settings.is_adaptive else {}),
                **({"predictive": self.settings.chosen} if self.settings.chosen is not None else {}),
                **({"truncated": True} if encoded[i].dropped else {}),
            }

    @property
    def needs_mean_pass(self) -> bool:
        """Whether the answers ask for more than the log probabilities: a distance, or the energy."""
        return self.distance is not None or (
            self.settings.max_false_alarms is not None and self.settings.oos_score == "energy"
        )

    def mean_scores(
        self, rows: Sequence[Example], encoded: Sequence[Encoded] | None = None, *, dataset: str | None = None
    ) -> dict[str, Tensor]:
        """What one pass at the posterior mean says of n rows, (n,) each: "energy", -log sum_c exp(logit_c) of the raw
        class logits, where it is asked for or `dataset` is given; "distance", where the run has one.

        Args:
            rows: n questions.
            encoded: the same as tokens, where they were encoded before.
            dataset: as in `log_probs`.
        """
        scorer = self.run.scorer
        mean_pass = MeanPass(scorer.model)
        with alone(scorer.model):
            if dataset is not None:
                found = log_probabilities(
                    self.run, rows, mean_pass, batch_size=self.batch_size, description=dataset,
                    over_ranks=self.over_ranks, encoded=encoded,
                )  # fmt: skip
            else:
                encoded = self.run.encode(list(rows)) if encoded is None else encoded
                found = predict(scorer, encoded, mean_pass, batch_size=self.batch_size, over_ranks=self.over_ranks)
        scores = {"energy": found[0, :, 0]} if dataset is not None or self.settings.oos_score == "energy" else {}
        if self.distance is not None:
            scores["distance"] = self.distance(found[0, :, 1 : 1 + mean_pass.size])
        return scores


def kind_of(strategy: Predictive) -> str:
    """ "mean", "mc" or "linearized": which temperature of a calibration holds; of auto, what it predicts by now."""
    if isinstance(strategy, AutoPredictive):
        return "mc" if strategy.choice is None else strategy.choice.predictive.name
    return strategy.inner.name if isinstance(strategy, AdaptivePredictive) else strategy.name


def make_strategy(run: Predictable, settings: PredictionSettings) -> Predictive:
    """The predictive of a run that settings name.

    Raises:
        UserError: settings that the run or the predictive does not have.
    """
    samples, seed, name = settings.samples, settings.seed, settings.predictive
    if settings.method is not None:
        if not isinstance(run, Run):
            raise UserError(f"{settings.method} is fitted on a run, but this adapter has no record of one.")
        return _drawn(load_post_hoc(settings.method).predictive(run, samples=samples, seed=seed), settings)
    if name == "linearized" and not run.is_bayesian:
        raise UserError("Only an adapter with a posterior over s has a linearised predictive; leave it out.")
    if samples == 0:
        name = "mean"
    elif name in (None, "auto"):
        name = "auto" if settings.sampling.is_plain else "mc"
    strategy = run.predictive(name, samples=samples, seed=seed, stochastic_layers=settings.stochastic_layers)
    return _drawn(strategy, settings)


def _drawn(strategy: Predictive, settings: PredictionSettings) -> Predictive:
    """With the posterior's scale, the classes and the kind of draws that settings ask for."""
    if isinstance(strategy, LinearizedPredictive):
        strategy.feature_variance = settings.feature_variance
    scaled = with_scale(strategy, 1.0 if settings.scale is None else settings.scale)
    return with_sampling(scaled, settings.drawn(), settings.temperature or 1.0)


def priors_over_training(record: RunRecord, priors: Mapping[str, float]) -> Tensor:
    """(C,) each label's prior over its share of the training rows.

    Raises:
        UserError: the run has no labels, others, or a record that does not say how often they were.
    """
    if record.labels is None or set(record.labels) != set(priors):
        raise UserError("priors are of a run whose rows share their labels, one number for each of them.")
    return torch.tensor(prior_ratios({label: priors[label] for label in record.labels}, record.class_counts))


def log_probabilities(
    run: Predictable,
    rows: Sequence[Example],
    predictive: Predictive,
    *,
    batch_size: int = 8,
    description: str = "predicting",
    over_ranks: bool = True,
    encoded: Sequence[Encoded] | None = None,
) -> Tensor:
    """(N, n, C) log class probabilities, with a progress bar; several processes share the work and all get them.

    Raises:
        UserError: rows that the run's scoring cannot encode.
    """
    tokens = run.encode(list(rows)) if encoded is None else encoded

    def with_trunk() -> list[Encoded]:
        return with_stored_trunk(run.scorer, tokens, batch_size=batch_size)

    made = processes.first_on_each_machine(with_trunk) if over_ranks else with_trunk()
    with progress_bar() as progress:
        bar = progress.add_task(description, total=len(made), detail="")
        return predict(
            run.scorer, made, predictive, batch_size=batch_size, advance=lambda n: progress.advance(bar, n),
            over_ranks=over_ranks,
        )  # fmt: skip


def labels_of(rows: Sequence[Example]) -> Tensor:
    """(n,) the right choices; of rows that may have several of C labels (n C,), 1 for yes and 0 for no."""
    if rows and rows[0].answers is not None:
        return torch.tensor([row.marks for row in rows]).flatten()
    return torch.tensor([row.answer for row in rows])


def describe_method(run: Run, predictive: Predictive, post_hoc: str | None = None) -> str:
    """As in a table: "plain LoRA", "MAP", "ScalaBL, mean", "ScalaBL, N = 10"; or the title of a post-hoc method."""
    if post_hoc is not None:
        return METHODS[post_hoc].title
    title = METHODS[run.record.method].title
    if not run.is_sampled:
        return title
    number = getattr(predictive, "samples", None)
    kind = getattr(predictive, "draws", "independent")
    suffix = "" if kind == "independent" else f", {kind}"
    layers = getattr(predictive, "stochastic_layers", None)
    suffix += "" if getattr(predictive, "feature_variance", None) is None else ", one contrast"
    suffix += "" if layers is None else f", s in {layers}"
    return f"{title}, {predictive.name if number is None else f'N = {number}'}{suffix}"
