"""A posterior in EleutherAI's lm-evaluation-harness: its model "scalabl", and ECE and NLL beside accuracy.

    python -m scalabl.serving.harness --model scalabl --model_args pretrained=DIR,samples=10 --tasks arc_easy

is the harness's own command line, all of its options included, after the import of this module, which is how its 0.4
learns of another package's model. A token's probability is the average over particles of what each gives it behind the
same text, in log-likelihoods as in generated text: p(y | x) = prod_t 1/N sum_n p(y_t | y_<t, x, s_n).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.generation.fan_out import averaged
from scalabl.metrics.figures import evaluate
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.runs.directory import find_base, require_adapter
from scalabl.runs.loading import load_adapter, require_base
from scalabl.runs.models import load_base
from scalabl.runs.record import RECORD, RunRecord


@register_model("scalabl")
class HarnessLM(HFLM):  # type: ignore[misc]
    """The average over particles of an adapter on its base model, as the harness's `hf` is one model.

    Args:
        pretrained: the adapter's directory: of `scalabl train`, or of any trainer's `save_pretrained`.
        samples: N particles, as they were learnt (a run's calibration is of its own rows); 0 is the posterior mean.
        seed: of the particles.
        base: the base model, if it is not where the adapter names it.
        dtype: of the base; None is as the run was trained, or the device's usual one.
        device: None is the accelerator, if there is one.
        options: of the harness's `hf` that are not about loading (batch_size, max_length, add_bos_token, ...).

    Raises:
        UserError: no adapter, an altered one, another base, a classification head, or samples without a posterior.
    """

    def __init__(
        self,
        pretrained: str,
        samples: int = 10,
        seed: int = 0,
        base: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        directory = Path(pretrained)
        config = require_adapter(directory)
        record = RunRecord.read_generating(directory) if (directory / RECORD).is_file() else None
        if config["peft_type"] != "SCALABL" and samples:
            raise UserError(f"{directory} has no posterior over s; give samples=0, which takes the adapter as it is.")
        named = base or (record.model if record else config["base_model_name_or_path"])
        loading = (record.base_options if record else {}) | ({} if dtype is None else {"dtype": dtype})
        model, tokenizer = load_base(find_base(named, directory), device=device, adapter=directory, **loading)
        if record is not None:
            require_base(model, record)
        super().__init__(load_adapter(model, directory), tokenizer=tokenizer, backend="causal", **options)
        self.particles = MonteCarloPredictive(samples, seed=seed) if samples else None

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T) tokens -> (B, T, V) logits; of particles the log-probabilities of their average, a pass each."""
        if self.particles is None:
            return super()._model_call(inps, *args, **kwargs)
        total: Tensor | None = None
        for number in range(self.particles.samples):
            with self.particles.context(self.model, number, 1):
                log_probs = super()._model_call(inps, *args, **kwargs).float().log_softmax(dim=-1)
            total = log_probs if total is None else torch.logaddexp(total, log_probs)
        assert total is not None
        return total - math.log(self.particles.samples)

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.particles is None:
            return super()._model_generate(context, *args, **kwargs)
        with averaged(self.model, self.particles):
            return super()._model_generate(context, *args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        return {"model_dtype": self.model.dtype, "model_num_parameters": self.model.num_parameters()}


def calibration(samples: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """ECE and NLL of a task's samples where these are choices, by the name of their filter; else nothing.

    Args:
        samples: what the harness logs of every document. The probabilities are the softmax over the choices'
            log-likelihoods, as its own `brier_score` has them.
    """
    found: dict[str, float | None] = {}
    for name in {sample["filter"] for sample in samples}:
        of_filter = [sample for sample in samples if sample["filter"] == name]
        if not all(map(_is_choice, of_filter)):
            continue
        rows = [torch.tensor([ll for ll, _ in sample["filtered_resps"]]) for sample in of_filter]
        scores = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-torch.inf)
        figures = evaluate(scores.double().softmax(dim=-1), torch.tensor([sample["target"] for sample in of_filter]))
        found |= {f"{metric},{name}": figures[metric].value for metric in ("ece", "nll")}
    return found


def _is_choice(sample: Mapping[str, Any]) -> bool:
    scored = sample["filtered_resps"]
    scores = all(isinstance(one, tuple | list) and len(one) == 2 for one in scored)
    plain = "acc_mutual_info" not in sample["metrics"]  # which has the choices without their question behind them
    return scores and plain and type(sample["target"]) is int and 0 <= sample["target"] < len(scored) > 1


def with_calibration(simple_evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """The harness's `simple_evaluate`, with `calibration` among the results of every task."""

    @functools.wraps(simple_evaluate)
    def evaluated(*args: Any, log_samples: bool = True, **options: Any) -> Any:
        results = simple_evaluate(*args, log_samples=True, **options)
        if results is not None:  # as of all ranks but the first
            for task, samples in results["samples"].items():
                results["results"][task] |= calibration(samples)
            if not log_samples:
                del results["samples"]
        return results

    return evaluated


def main() -> None:
    """The harness's command line, which takes its `simple_evaluate` from the package when it runs."""
    lm_eval.simple_evaluate = with_calibration(lm_eval.simple_evaluate)
    cli_evaluate()


if __name__ == "__main__":
    main()
