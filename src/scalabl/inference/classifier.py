"""`Classifier`: questions in, class probabilities and their uncertainty out; a face of `Predictor` for Python.

What it takes and gives is the same wherever the model runs: questions as rows, log-probabilities as an `Answer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalabl.core.errors import UserError
from scalabl.data.example import Example
from scalabl.data.questions import rows_of
from scalabl.data.template import TEXT
from scalabl.inference.adapter import BareRun, base_of, head_of, letters_of, record_of, refuse_unread, shared_labels
from scalabl.inference.answer import Answer, answer_of
from scalabl.inference.predictor import Predictor
from scalabl.inference.promise import Promise
from scalabl.inference.scope import require_coverage, require_scope
from scalabl.inference.settings import PredictionSettings, refuse_of_one_label
from scalabl.predictive.base import Predictive, chosen
from scalabl.predictive.sampling import PLAIN, Sampling
from scalabl.runs.loading import load_adapter, require_base, scoring_of
from scalabl.runs.method import Run
from scalabl.runs.record import HEAD, RECORD
from scalabl.runs.stock import is_stock
from scalabl.scoring.base import Scoring, cut_rows_sentence
from scalabl.scoring.prefix import SharedPrefix, shared_prefix
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.trunk import Trunk
from scalabl.tuner.threads import alone


class Classifier:
    """A Bayesian classifier over label words, choices or the labels of a classification head.

    Threads may share one: they take turns, and a plain pass of the model in another thread is not touched.

    Args:
        model: the base model with its adapter.
        scoring: how rows become class logits; or the tokenizer of a model with a classification head
            (Transformers' ...ForSequenceClassification), whose labels are those of its configuration, `id2label`.
        samples: N particles of the posterior; 0 predicts with the posterior mean.
        seed: the seed of the particles.
        sampling: another kind of draws, or adaptive N.
        predictive: "mc", "linearized", or "auto", which takes the cheaper one where it is as good
            (`AutoPredictive`; `classifier.predictive.choice` says which); None is auto, mc where `sampling` is given.
        prefix: in front of every prompt: an instruction, or examples with their answers. Where it is long, it is
            encoded once a particle, and kept from call to call.
        dropout: of a plain LoRA that was trained with it: N masks are averaged (MC dropout). 0 leaves it off.
        batch_size: questions at a time.
        temperature: on the class logits of every particle.
        abstain: label None where the highest probability is below this.

    Attributes:
        takes_prompts: whether texts are prompts already, which go through no template.

    Raises:
        UserError: a tokenizer beside a model without a head, or a head that scores rows in another way than its own.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        scoring: Scoring | PreTrainedTokenizerBase,
        *,
        samples: int = 10,
        seed: int = 0,
        sampling: Sampling = PLAIN,
        predictive: str | None = None,
        prefix: str = "",
        dropout: float = 0.0,
        batch_size: int = 8,
        temperature: float | None = None,
        abstain: float | None = None,
    ) -> None:
        scoring = scoring if isinstance(scoring, Scoring) else head_of(model, scoring)
        run = BareRun(_scorer(model, scoring, prefix), dropout)
        settings = PredictionSettings(predictive, samples, seed, sampling, temperature=temperature, abstain=abstain)
        self._take(Predictor(run, settings, batch_size=batch_size, over_ranks=False))

    def _take(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.scorer = predictor.run.scorer
        self.takes_prompts = False

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        labels: Sequence[str] | None = None,
        template: str | None = None,
        samples: int = 10,
        seed: int = 0,
        sampling: Sampling = PLAIN,
        predictive: str | None = None,
        prefix: str = "",
        chat: bool | None = None,
        max_length: int | None = None,
        batch_size: int = 8,
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        method: str | None = None,
        temperature: float | None = None,
        abstain: float | None = None,
        max_error: float | Promise | None = None,
        priors: Mapping[str, float] | None = None,
        raw: bool = False,
        max_false_alarms: float | None = None,
        coverage: float | None = None,
    ) -> Classifier:
        """Load an adapter directory: of `scalabl train`, of any trainer's `save_pretrained`, or a plain LoRA.

        Args:
            directory: the adapter's directory.
            labels: the label words, each one token. Of an adapter with a classification head: its labels in the order
                of the head's outputs. None takes labels or choices from the directory's own record (`scalabl train`
                writes one), or a head's from the `id2label` of a `config.json` there or of the base model's.
            template: with `labels`: how a text becomes a prompt, "{text}\\nLabel:". A run's own template holds where it
                has one. Where nothing says how, texts are prompts already, used as they are; {"prompt"} always is.
            samples: N particles; 0 for the posterior mean.
            seed: the seed of the particles.
            sampling: another kind of draws, or adaptive N.
            predictive: "mc", "linearized" or "auto"; None is what the directory's record says, else auto.
            prefix: in front of every prompt: an instruction, or examples with their answers.
            chat: with `labels`: put each prompt through the tokenizer's chat template; None is False.
            max_length: with `labels`: longest prompt in tokens, 4096 if None; longer ones lose their beginning. Of
                a head without a record: longest text, 512 or the model's positions if None; longer ones lose their end.
            batch_size: questions at a time.
            model: the base model or where it is; by default the one that the adapter names.
            tokenizer: in the place of the one that was saved beside the adapter, or else of the base model's own.
            method: a post-hoc method that was fitted on the run ("temperature", "laplace", ...), in place of its own.
            temperature: on the class logits of every particle, in the place of the run's own calibration.
            abstain: label None where the highest probability is below this.
            max_error: label None where this error rate among answers would not be kept, by a threshold from the run's
                held-out rows, which are predicted now; a `Promise` says more than the rate.
            priors: how often each of a run's labels is where its rows come from, if not as among the training rows.
            raw: leave the run's own calibration out, which holds for its own prompts alone (not with labels, prefix).
            max_false_alarms: label None where a row is further out of the run's scope than all but this share of rows
                in scope, by a threshold from its held-out rows.
            coverage: give each row the set of labels that holds the right one at this rate, likewise.

        Raises:
            UserError: a label is not one token, files are missing or altered, another base model, a head whose labels
                are not known or whose weights were not saved, or the directory has no record, which a method and a
                promise need.
        """
        path = Path(directory)
        if not (path / "adapter_config.json").is_file():
            raise UserError(f"{path} holds no adapter_config.json; give a directory made by save_pretrained.")
        record = record_of(path, labels=labels, max_length=max_length, model=model)
        if record is not None and is_stock(record):
            labels = max_length = None  # they are in its record now
        if labels is not None and record is not None and record.scoring["scoring"] == HEAD:
            refuse_unread(record.scoring, labels=list(labels))
            labels = None
        if labels is None and record is None:
            raise UserError(f"{path} does not say what its labels are; pass labels=[...].")
        own_labels = None if record is None else record.labels
        if labels is not None and tuple(labels) == own_labels:
            labels = None  # as it was trained
        if labels is not None and own_labels is not None and set(labels) == set(own_labels):
            raise UserError(f"labels are the run's own, in the order {', '.join(own_labels)}; leave them out.")
        promise = Promise(max_error) if isinstance(max_error, float) else max_error
        settings = PredictionSettings(
            predictive, samples, seed, sampling, method=method, temperature=temperature, abstain=abstain,
            promise=promise, priors=None if priors is None else dict(priors), max_false_alarms=max_false_alarms,
            coverage=coverage, raw=raw or labels is not None or bool(prefix),
        )  # fmt: skip
        if record is not None and record.several:
            refuse_of_one_label(adaptive=settings.is_adaptive, priors=priors, coverage=coverage)
        if labels is None and record is not None:
            refuse_unread(record.scoring, template=template, chat=chat, max_length=max_length)
        if priors is not None and (record is None or labels is not None):
            raise UserError("priors are of a run's own labels, with its record beside the adapter; leave them out.")
        if record is None and (method is not None or settings.has_promise):
            raise UserError(f"{path} holds no {RECORD}, so that no method was fitted and no rows were held out.")
        if record is not None and settings.has_promise:
            if labels is not None or prefix:
                raise UserError("An error rate is promised for the run's own prompts; leave out labels and prefix.")
            if promise is not None:
                promise.require(record, predictive)
            if max_false_alarms is not None:
                require_scope(record, max_false_alarms, None, predictive)
            if coverage is not None:
                require_coverage(record, coverage)
        base, base_tokenizer = base_of(path, record, model, tokenizer)
        if record:
            require_base(base, record)
        scoring: Scoring
        if labels is not None:
            # other labels of the same texts; records of older runs lack the template, which was this
            own = {} if record is None or record.labels is None else {"template": TEXT, **record.scoring}
            template = template or own.get("template")
            chat, max_length = own.get("chat") if chat is None else chat, max_length or own.get("max_length")
            scoring = letters_of(labels, base_tokenizer, template=template, chat=chat, max_length=max_length)
        else:
            assert record is not None
            scoring = scoring_of(record, base, base_tokenizer)
        scorer = _scorer(load_adapter(base, path), scoring, prefix)
        run = BareRun(scorer) if record is None else Run(record, scorer, base_tokenizer, path)
        classifier = cls.__new__(cls)
        classifier._take(Predictor(run, settings, batch_size=batch_size, over_ranks=False))
        classifier.takes_prompts = labels is not None and template is None
        if settings.has_promise:
            classifier.predictor.resolve()
        elif classifier.predictor.settings.why is not None:
            warnings.warn(classifier.predictor.settings.why, stacklevel=2)
        return classifier

    @property
    def predictive(self) -> Predictive:
        """The strategy that turns the posterior into predictions."""
        return self.predictor.strategy

    @predictive.setter
    def predictive(self, predictive: Predictive) -> None:
        self.predictor.take(predictive)

    def __call__(self, questions: str | Sequence[str | Mapping[str, Any] | Example]) -> Answer:
        """Classify questions.

        Args:
            questions: texts (with label words), rows as `scalabl train` takes them, {"text"} or {"question",
                "choices"}, rows {"prompt"} that go through no template, or `Example`s.

        Raises:
            UserError: no questions, or a text where the scoring needs choices.
        """
        rows = rows_of(questions, self._labels, prompts=self.takes_prompts)
        with alone(self.scorer.model):  # threads take turns
            encoded = self.predictor.run.encode(rows)
            cut = cut_rows_sentence(encoded, self.scorer.scoring)
            if cut is not None:
                warnings.warn(cut, stacklevel=2)
            if self.scorer.scoring.prefix:
                used = chosen(self.predictive, self.scorer, encoded, self.predictor.batch_size)
                self.predictor.prefix = self._shared_prefix if getattr(used, "shares_prefix", False) else None
            log_probs = self.predictor.log_probs(rows, encoded)
            of_mean = self.predictor.mean_scores(rows, encoded) if self.predictor.needs_mean_pass else {}
        return answer_of(rows, log_probs, self.predictor.settings, of_mean, self.predictor.per_row)

    @property
    def _labels(self) -> tuple[str, ...] | None:
        """The labels that all rows share, where they do."""
        return shared_labels(self.scorer.scoring, getattr(getattr(self.predictor.run, "record", None), "labels", None))

    @cached_property
    def _shared_prefix(self) -> SharedPrefix | None:
        """What every prompt begins with, to be encoded once; None where it is too short for that."""
        labels = self._labels or ("yes", "no")
        two = [self.scorer.scoring.encode(Example(question, question, labels, None)) for question in ("A", "1")]
        return shared_prefix(self.scorer, two)


def _scorer(model: PeftModel | PreTrainedModel, scoring: Scoring, prefix: str) -> Scorer:
    return Scorer(model, scoring.with_prefix(prefix) if prefix else scoring, Trunk(model))
