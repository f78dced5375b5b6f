"""What a head does not read of the last layer is not computed, and no logit and no gradient shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from head_bases import LABELS, MODELS, body_of
from peft import get_peft_model
from tiny_base import perturb, tiny_encoder
from torch import Tensor, nn

from scalabl.data import Example
from scalabl.methods.plain import lora_options
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, predict
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Scorer
from scalabl.scoring.head import Head
from scalabl.scoring.read_token import known_first_token, remember_first_token, whole_rows
from scalabl.scoring.trunk import Trunk
from scalabl.tuner import ScalaBLConfig
from scalabl.tuner.layers import decoder_layers
from scalabl.tuner.state import mean_of_any

FIRST_TOKEN = {"bert", "roberta", "electra", "deberta-v2"}
TEXTS = ("red", "a green answer that is long enough to be padded by others for sure", "blue or not?")


def scorer_of(base: Path) -> Scorer:
    model, tokenizer = load_base(str(base), labels=LABELS)
    torch.manual_seed(1)
    adapted = get_peft_model(model, ScalaBLConfig(**lora_options(Settings.flat(layers="last:2", r=4), model)))
    perturb(adapted)
    return Scorer(adapted.eval(), Head(tokenizer, labels=LABELS, max_length=100), Trunk(adapted))


def encoded(scorer: Scorer) -> list[Any]:
    return [scorer.scoring.encode(Example(str(i), text, LABELS, i)) for i, text in enumerate(TEXTS)]


def tokens_seen(module: nn.Module, seen: list[int]) -> Any:
    return module.register_forward_hook(lambda _module, _args, output: seen.append(output.shape[1]))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_those_of_whole_rows(name: str, tmp_path: Path) -> None:
    scorer = scorer_of(body_of(name, tmp_path))
    rows = encoded(scorer)
    scorer.reads_packed(rows)
    assert known_first_token(scorer.model) == (name in FIRST_TOKEN)
    batch = scorer.with_trunk(scorer.scoring.collate(rows))
    trained = [p for n, p in scorer.model.named_parameters() if "lora_" in n and "default" in n]

    def passed() -> tuple[Tensor, tuple[Tensor | None, ...]]:
        logits = scorer.class_logits(batch)
        loss = scorer.scoring.likelihood.loss(logits, batch.answers)
        return logits, torch.autograd.grad(loss, trained, allow_unused=True)

    alone, gradients = passed()
    with whole_rows():
        whole, expected = passed()
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    for predictive in (MeanPredictive(), MonteCarloPredictive(3, seed=1), LinearizedPredictive()):
        short = predict(scorer, rows, predictive, batch_size=2)
        with whole_rows():
            torch.testing.assert_close(short, predict(scorer, rows, predictive, batch_size=2), rtol=1e-4, atol=1e-4)


def test_the_last_layer_works_on_one_token_a_row() -> None:
    scorer = scorer_of(tiny_encoder())
    rows, seen = encoded(scorer), []
    last, below = decoder_layers(scorer.model)[-1], decoder_layers(scorer.model)[-2]
    scorer.reads_packed(rows)
    handles = [tokens_seen(module, seen) for module in (below.intermediate, last.attention.self.value)]
    handles += [tokens_seen(module, seen) for module in (last.attention.output, last.intermediate, last.output)]
    batch = scorer.scoring.collate(rows)
    length = batch.input_ids.shape[1]
    scorer.class_logits(batch)
    assert seen == [length, length, 1, 1, 1]
    seen.clear()
    with whole_rows():
        scorer.class_logits(batch)
    assert seen == [length] * 5
    for handle in handles:
        handle.remove()
    # a pass of the model's own is whole, and so is everything before the model was tried
    whole = scorer.model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[-1]
    assert whole.shape[1] == length
    fresh = scorer_of(tiny_encoder())
    tokens_seen(decoder_layers(fresh.model)[-1].output, seen)
    fresh.class_logits(batch)
    assert seen[-1] == length
    remember_first_token(fresh.model, True)  # as a process that others told
    fresh.class_logits(batch)
    assert seen[-1] == 1


def test_a_model_that_cannot_be_tried_yet_is_whole_until_it_can() -> None:
    scorer = scorer_of(tiny_encoder())
    rows, unready = encoded(scorer), [True]

    def fail(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
        if unready:
            raise RuntimeError("not among its particles")

    scorer.model.get_base_model().classifier.register_forward_pre_hook(fail)
    scorer.reads_packed(rows)
    assert not known_first_token(scorer.model)
    unready.clear()
    scorer.reads_packed(rows)
    assert known_first_token(scorer.model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_for_gradients_are_whole(reentrant: bool) -> None:
    scorer = scorer_of(tiny_encoder())
    rows = encoded(scorer)
    scorer.reads_packed(rows)
    assert known_first_token(scorer.model)
    batch = scorer.scoring.collate(rows)
    trained = [p for n, p in scorer.model.named_parameters() if "lora_" in n and "default" in n]

    def gradients() -> list[Tensor]:
        scorer.model.zero_grad()
        scorer.scoring.likelihood.loss(scorer.class_logits(batch), batch.answers).backward()
        return [p.grad.clone() for p in trained if p.grad is not None]

    expected = gradients()
    scorer.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    scorer.model.enable_input_require_grads()
    scorer.model.train()
    for module in scorer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with mean_of_any(scorer.model):
        found = gradients()
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_head_that_reads_other_tokens_has_them() -> None:
    scorer = scorer_of(tiny_encoder())
    pooler = scorer.model.get_base_model().bert.pooler

    def averaged(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (args[0][:, :3].mean(dim=1, keepdim=True),)  # of tokens that every row has: no padding

    pooler.register_forward_pre_hook(averaged)
    rows = encoded(scorer)
    with torch.no_grad():
        own = [scorer.model(input_ids=torch.tensor([row.input_ids])).logits.log_softmax(dim=-1) for row in rows]
    torch.testing.assert_close(predict(scorer, rows, MeanPredictive(), batch_size=1)[0], torch.cat(own))
    assert not known_first_token(scorer.model)
    fresh = scorer_of(tiny_encoder())
    fresh.model.get_base_model().bert.pooler.register_forward_pre_hook(averaged)
    remember_first_token(fresh.model, True)  # which is wrong, and would be seen
    assert (predict(fresh, rows, MeanPredictive(), batch_size=1)[0] - torch.cat(own)).abs().max() > 1e-3
