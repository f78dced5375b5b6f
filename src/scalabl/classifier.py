"""`Classifier`: questions in, calibrated class probabilities and their uncertainty out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scalabl.errors import UserError
from scalabl.loading import load_adapter, require_base
from scalabl.models import load_base
from scalabl.predictive import MeanPredictive, MonteCarloPredictive, Predictive, predict
from scalabl.predictive.weight_noise import blob_draws
from scalabl.run_directory import RECORD, finished_record
from scalabl.scoring import Letters, Scorer, Scoring, make_scoring
from scalabl.tasks import Example
from scalabl.tasks.example import check
from scalabl.trunk import Trunk
from scalabl.tuner import StochasticProjection
from scalabl.tuner_blob import BLoBProjection
from scalabl.uncertainty import average, decompose


@dataclass(frozen=True)
class Answer:
    """Predictions for n questions with C classes (zeros in `probs` where a question has fewer choices).

    Attributes:
        probs: (n, C) class probabilities, averaged over the particles.
        entropy: (n,) total uncertainty H[mean p], in nats.
        aleatoric: (n,) mean of H[p_i]: what the data leaves open, in nats.
        epistemic: (n,) entropy - aleatoric, the mutual information: what the model never learnt, in nats.
        label: the n most probable labels (or choice texts).
        particle_log_probs: (N, n, C) log class probabilities of each particle.
    """

    probs: NDArray[np.float32]
    entropy: NDArray[np.float32]
    aleatoric: NDArray[np.float32]
    epistemic: NDArray[np.float32]
    label: list[str]
    particle_log_probs: NDArray[np.float32]


class Classifier:
    """A Bayesian classifier over label words or choices.

    Args:
        model: the base model with its adapter.
        scoring: how rows become class logits.
        samples: N particles of the posterior; 0 predicts with the posterior mean.
        seed: the seed of the particles.
        batch_size: questions at a time.
    """

    def __init__(
        self, model: PeftModel, scoring: Scoring, *, samples: int = 10, seed: int = 0, batch_size: int = 8
    ) -> None:
        if samples < 0:
            raise UserError(f"samples is {samples}; it must be 0 (the posterior mean) or more.")
        bayesian = any(isinstance(module, StochasticProjection) for module in model.modules())
        self.predictive: Predictive = MeanPredictive()
        if samples and bayesian:
            self.predictive = MonteCarloPredictive(samples, seed=seed)
        elif samples and any(isinstance(module, BLoBProjection) for module in model.modules()):
            self.predictive = blob_draws(model, samples=samples, seed=seed)
        trunk = Trunk(model)
        self.scorer = Scorer(model, scoring, trunk if trunk.depth else None)
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        labels: Sequence[str] | None = None,
        samples: int = 10,
        seed: int = 0,
        chat: bool = False,
        max_length: int = 4096,
        batch_size: int = 8,
        model: PreTrainedModel | str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Classifier:
        """Load an adapter directory: of `scalabl train`, of any trainer's `save_pretrained`, or a plain LoRA.

        Args:
            directory: the adapter's directory.
            labels: the label words, each one token; questions are then prompts, used as they are. None takes
                labels or choices from the directory's own record (`scalabl train` writes one).
            samples: N particles; 0 for the posterior mean.
            seed: the seed of the particles.
            chat: put each prompt through the tokenizer's chat template.
            max_length: longest prompt in tokens; longer ones lose their beginning.
            batch_size: questions at a time.
            model: the base model or where it is; by default the one that the adapter names.
            tokenizer: the base model's, when `model` is one already loaded.

        Raises:
            UserError: a label is not one token, files are missing or altered, another base model.
        """
        path = Path(directory)
        if not (path / "adapter_config.json").is_file():
            raise UserError(f"{path} holds no adapter_config.json; give a directory made by save_pretrained.")
        record = finished_record(path) if (path / RECORD).is_file() else None
        if labels is None and record is None:
            raise UserError(f"{path} does not say what its labels are; pass labels=[...].")
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise UserError("A loaded model needs its tokenizer beside it; pass tokenizer=...")
            base, base_tokenizer = model, tokenizer
        else:
            named = (
                record["recipe"]["model"] if record else PeftConfig.from_pretrained(str(path)).base_model_name_or_path
            )
            if model is None and not named:
                raise UserError(f"{path} does not name its base model; pass model=...")
            held = {name: record["recipe"][name] for name in ("dtype", "bits")} if record else {}
            base, base_tokenizer = load_base(model or named, **held)
        if record:
            require_base(base, record)
        scoring: Scoring
        if labels is not None:
            scoring = Letters(base_tokenizer, labels=tuple(labels), raw_prompt=True, chat=chat, max_length=max_length)
        else:
            assert record is not None
            scoring = make_scoring(record["scoring"], base_tokenizer)
        return cls(load_adapter(base, path), scoring, samples=samples, seed=seed, batch_size=batch_size)

    def __call__(self, questions: str | Sequence[str | Mapping[str, Any] | Example]) -> Answer:
        """Classify questions.

        Args:
            questions: prompts (with label words), or rows {"question", "choices"} or `Example`s.

        Raises:
            UserError: no questions, or a prompt where the scoring needs choices.
        """
        rows = [self._row(i, q) for i, q in enumerate([questions] if isinstance(questions, str) else questions)]
        if not rows:
            raise UserError("There are no questions to answer; pass at least one.")
        encoded = [self.scorer.scoring.encode(row) for row in rows]
        log_probs = predict(self.scorer, encoded, self.predictive, batch_size=self.batch_size)
        probs, uncertainty = average(log_probs), decompose(log_probs)
        best = probs.argmax(dim=-1).tolist()
        return Answer(
            probs=probs.float().numpy(),
            entropy=uncertainty.total.float().numpy(),
            aleatoric=uncertainty.aleatoric.float().numpy(),
            epistemic=uncertainty.epistemic.float().numpy(),
            label=[row.choices[i] for row, i in zip(rows, best, strict=True)],
            particle_log_probs=log_probs.numpy(),
        )

    def _row(self, index: int, question: str | Mapping[str, Any] | Example) -> Example:
        labels = self.scorer.scoring.labels if isinstance(self.scorer.scoring, Letters) else None
        if isinstance(question, Example):
            return self._checked(question, labels)
        if isinstance(question, str):
            if labels is None:
                raise UserError('This classifier scores choices; pass rows {"question": ..., "choices": [...]}.')
            return Example(str(index), question, labels, None)
        choices = question.get("choices", labels)
        text = question.get("question", question.get("text"))
        if text is None or choices is None:
            raise UserError(f'Question {index} lacks "question" or "choices"; give both.')
        return self._checked(Example(str(index), text, tuple(choices), None), labels)

    def _checked(self, row: Example, labels: tuple[str, ...] | None) -> Example:
        if labels is not None and row.choices != labels:
            raise UserError(f"Question {row.id} has choices of its own, but this classifier answers {labels}.")
        return check(row, f"question {row.id}")
