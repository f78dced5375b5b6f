"""The harness's tasks, from local files, answered by a posterior."""

# ruff: noqa: E402  (what is tested imports lm_eval)
from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_base import adapted, as_json, questions, tiny_base, write_jsonl

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager

import scalabl
from scalabl.core.errors import UserError
from scalabl.generation import decode
from scalabl.predictive import MonteCarloPredictive
from scalabl.serving.harness import HarnessLM, calibration, with_calibration

Results = dict[str, Any]
Evaluate = Callable[..., Results]
# choices of several tokens, a text to write, and a text to score
TASKS: dict[str, dict[str, Any]] = {
    "tiny_choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}\nAnswer:", "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
    },
    "tiny_answers": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}],
    },
    "tiny_texts": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ScalaBL adapter whose particles disagree, with its mean."""
    directory = tmp_path_factory.mktemp("adapter")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tiny_base())
    model.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """The harness's `simple_evaluate` on the tiny tasks."""
    directory = tmp_path_factory.mktemp("tasks")
    rows = write_jsonl(directory / "rows.jsonl", map(as_json, questions(6, choices=(3,))))
    for name, task in TASKS.items():
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        (directory / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **local, **task}))
    manager = TaskManager(include_path=str(directory), include_defaults=False)

    def run(model: str, **arguments: Any) -> Results:
        results: Results = with_calibration(lm_eval.simple_evaluate)(
            model=model, model_args=arguments, tasks=list(TASKS), task_manager=manager, batch_size=4, device="cpu",
            bootstrap_iters=0,
        )  # fmt: skip
        return results

    return run


def answers(results: Results) -> dict[str, list[Any]]:
    """What the model said to each request, in the order of the documents."""
    return {name: [each["resps"] for each in results["samples"][name]] for name in TASKS}


def test_the_mean_answers_as_the_harness_s_own_model_does(adapter: Path, evaluate: Evaluate) -> None:
    ours = evaluate("scalabl", pretrained=str(adapter), samples=0)
    theirs = evaluate("hf", pretrained=str(tiny_base()), peft=str(adapter / "mean"))
    found, expected = answers(ours), answers(theirs)
    assert found["tiny_answers"] == expected["tiny_answers"]
    for name in ("tiny_choices", "tiny_texts"):
        flat = [[one for request in doc for one in request] for doc in found[name]]
        their = [[one for request in doc for one in request] for doc in expected[name]]
        for one, other in zip(flat, their, strict=True):
            for mine, his in zip(one, other, strict=True):
                assert mine == pytest.approx(his, abs=1e-4)
    for name, metric in (("tiny_choices", "acc,none"), ("tiny_choices", "ece,none"), ("tiny_choices", "nll,none"),
                         ("tiny_choices", "brier_score,none"), ("tiny_texts", "word_perplexity,none")):  # fmt: skip
        assert ours["results"][name][metric] == pytest.approx(theirs["results"][name][metric], rel=1e-4), metric


def test_particles_are_averaged_token_by_token(adapter: Path, evaluate: Evaluate) -> None:
    results = evaluate("scalabl", pretrained=str(adapter), samples=4, seed=1)
    mean = answers(evaluate("scalabl", pretrained=str(adapter), samples=0))
    found = answers(results)
    assert found["tiny_choices"] != mean["tiny_choices"]
    model = scalabl.Classifier.from_pretrained(adapter, labels=["yes", "no"]).scorer.model
    tokenizer = HarnessLM(str(adapter), samples=0, device="cpu").tokenizer
    for sample in results["samples"]["tiny_choices"]:
        for (context, choice), [[(ll, _)]] in zip(sample["arguments"], [[r] for r in sample["resps"]], strict=True):
            prompt, whole = (tokenizer(text)["input_ids"] for text in (context, context + choice))
            with torch.no_grad(), scalabl.particles(model, 4, seed=1):
                logits = model(input_ids=torch.tensor([whole] * 4)).logits
            average = logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(4)
            expected = sum(average[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))
            assert ll == pytest.approx(expected, abs=1e-4)
    particles = MonteCarloPredictive(4, seed=1)
    for sample in results["samples"]["tiny_answers"]:
        [[decoded]] = decode(model, tokenizer, [sample["arguments"][0][0]], particles, max_new_tokens=6)
        assert sample["resps"][0][0] == decoded.text.split("\n")[0]


def test_calibration_is_of_choices_alone() -> None:
    scored = [(math.log(0.6), False), (math.log(0.2), False), (math.log(0.2), False)]
    two = [(math.log(0.9), False), (math.log(0.1), False)]
    samples = [
        {"filter": "none", "metrics": ["acc"], "target": 0, "filtered_resps": scored},
        {"filter": "none", "metrics": ["acc"], "target": 1, "filtered_resps": two},
    ]
    found = calibration(samples)
    assert found.keys() == {"ece,none", "nll,none"}
    assert found["nll,none"] == pytest.approx(-(math.log(0.6) + math.log(0.1)) / 2)
    assert found["ece,none"] == pytest.approx((0.4 + 0.9) / 2)
    assert calibration([{"filter": "none", "metrics": ["em"], "target": "red", "filtered_resps": ["red"]}]) == {}


def test_an_adapter_without_a_posterior_has_no_particles(adapter: Path) -> None:
    with pytest.raises(UserError, match="has no posterior over s; give samples=0"):
        HarnessLM(str(adapter / "mean"))
