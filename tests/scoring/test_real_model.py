"""The embedded SmolLM2-135M-Instruct: the same identities on real weights, and what it knows untrained."""

import pytest
import torch
from peft import get_peft_model
from tiny_base import perturb
from transformers import PreTrainedModel

import scalabl
from scalabl.data import Example, load_task
from scalabl.predictive import MeanPredictive, predict
from scalabl.runs.models import EMBEDDED, load_base
from scalabl.scoring import Continuation, Scorer
from scalabl.scoring.trunk import Trunk


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, object]:
    return load_base(EMBEDDED)


@pytest.fixture(scope="module")
def validation() -> list[Example]:
    return list(load_task("arc-easy").split("validation")[:60])


def test_packed_choices_equal_plain_passes_of_their_own(smollm2, validation) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = smollm2
    scoring = Continuation(tokenizer, normalization="sum")
    rows = validation[:3]
    batch = scoring.collate([scoring.encode(row) for row in rows])
    with torch.no_grad():
        found = Scorer(model, scoring).class_logits(batch)
        for row, scores in zip(rows, found, strict=True):
            prompt = tokenizer(scoring.prompt(row))["input_ids"]
            for choice, score in zip(row.choices, scores, strict=False):
                # prompt and choice as one text, as the tokenizer itself would cut it
                ids = tokenizer(f"{scoring.prompt(row)} {choice}")["input_ids"]
                log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
                expected = sum(log_probs[i - 1, ids[i]] for i in range(len(prompt), len(ids)))
                torch.testing.assert_close(score, expected, atol=2e-3, rtol=1e-4)


def test_untrained_accuracy_on_arc_easy_is_far_above_chance(smollm2, validation) -> None:  # type: ignore[no-untyped-def]
    model, tokenizer = smollm2
    scoring = Continuation(tokenizer)
    log_probs = predict(Scorer(model, scoring), [scoring.encode(row) for row in validation], MeanPredictive())
    right = log_probs[0].argmax(dim=-1) == torch.tensor([row.answer for row in validation])
    # chance is 0.25 +- 0.056 for 60 rows
    assert right.float().mean().item() > 0.42


def test_the_trunk_equals_the_full_pass_under_particles(smollm2, validation) -> None:  # type: ignore[no-untyped-def]
    base, tokenizer = smollm2
    config = scalabl.ScalaBLConfig(r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=list(range(22, 30)))
    model = get_peft_model(base, config).eval()
    perturb(model)
    scoring = Continuation(tokenizer)
    trunk = Trunk(model)
    batch = scoring.collate([scoring.encode(row) for row in validation[:2]])
    whole, resumed = Scorer(model, scoring), Scorer(model, scoring, trunk)
    with torch.no_grad(), scalabl.particles(model, 2):
        expected = whole.class_log_probs(batch.repeat(2))
        found = resumed.class_log_probs(resumed.with_trunk(batch).repeat(2))
    model.unload()
    assert trunk.depth == 22
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected[:2] - expected[2:]).abs().max() > 1e-3
