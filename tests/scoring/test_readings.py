"""Models whose layers do more than attend, or count positions by columns: a row scores as the model reads it alone."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import transformers
from architectures import CONFIGS, PACKED, SIZES, TOKENIZER, adapted, model_of
from tiny_base import questions
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextAttention

import scalabl
from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.predictive.base import MeanPredictive, predict
from scalabl.predictive.linearized import logit_jacobian
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.scoring import Continuation, Letters, Scorer
from scalabl.scoring.base import Scoring
from scalabl.scoring.trunk import Trunk
from scalabl.tuner.layers import decoder_layers

# older Transformers share keys and values between layers through a cache alone
SHARED = "shared_kv_states" in inspect.signature(Gemma3nTextAttention.forward).parameters


@torch.no_grad()
def alone(model: torch.nn.Module, scoring: Scoring, row: Example) -> Tensor:
    """(C,) log-probabilities of a row's choices from passes of its own, without padding and without a mask."""
    if isinstance(scoring, Letters):
        ids = torch.tensor([scoring.encode(row).input_ids])
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1, scoring.label_ids[: len(row.choices)]]
        return logits.log_softmax(-1)
    prompt, found = scoring.prompt_ids(scoring.prompt(row)), []  # type: ignore[attr-defined]
    for choice in row.choices:
        ids = scoring.continuation_ids(choice)
        out = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found.append(out.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)].sum())
    return torch.stack(found).log_softmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_in_a_batch_score_as_the_model_reads_them_alone(name: str) -> None:
    model = model_of(name)
    rows = questions(4)
    rows[1] = Example("long", "red or blue? " * 6, ("red", "a long answer", "ninety-nine"), 0)
    for scoring in (Letters(TOKENIZER), Continuation(TOKENIZER, normalization="sum")):
        scorer = Scorer(model, scoring)
        encoded = [scoring.encode(row) for row in rows]
        if name == "gemma3n" and not SHARED:
            with pytest.raises(UserError, match="otherwise without a cache.*upgrade"):
                predict(scorer, encoded, MeanPredictive())
            continue
        scorer.check_packing(encoded[0])
        found = predict(scorer, encoded, MeanPredictive())[0]
        for row, of_row in zip(rows, found, strict=True):
            number = len(row.choices)
            torch.testing.assert_close(of_row[:number], alone(model, scoring, row), atol=1e-4, rtol=1e-4)
            assert (of_row[number:] == -torch.inf).all()
        assert scorer.reads_packed(encoded) == (name in PACKED)
    assert len(decoder_layers(model)) == model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize(("name", "targets"), [("lfm2", ["q_proj", "in_proj"]), ("bloom", ["query_key_value"])])
def test_particles_gradients_and_trunks_are_those_of_rows_alone(name: str, targets: list[str]) -> None:
    model = adapted(name, targets, layers_to_transform=[1])
    scoring = Continuation(TOKENIZER, normalization="sum")
    rows = questions(3)
    encoded = [scoring.encode(row) for row in rows]
    with_trunk = Scorer(model, scoring, Trunk(model))
    found = predict(with_trunk, encoded, MonteCarloPredictive(3, seed=1))
    for particle in range(3):
        with scalabl.particles(model, 1, seed=1, first=particle):
            for row, of_row in zip(rows, found[particle], strict=True):
                torch.testing.assert_close(of_row[: len(row.choices)], alone(model, scoring, row), atol=1e-4, rtol=1e-4)
    assert (found[0] - found[1]).abs().nan_to_num(0).max() > 1e-3
    together = logit_jacobian(with_trunk, scoring.collate(encoded))[1]
    one = logit_jacobian(Scorer(model, scoring), scoring.collate(encoded[:1]))[1]
    for layer, jacobian in one.items():
        torch.testing.assert_close(together[layer][:1, : jacobian.shape[1]], jacobian, atol=1e-4, rtol=1e-3)


def test_the_choices_of_a_question_share_one_draw_in_passes_of_their_own() -> None:
    # one choice stands there twice: with a draw of its own it would score otherwise
    model = adapted("lfm2", ["q_proj", "in_proj"], lora_dropout=0.5).train()
    scoring = Continuation(TOKENIZER, normalization="sum")
    row = scoring.encode(Example("x", "Which?", ("red", "blue"), 0))
    twice = [i for i, segment in enumerate(row.segments) if segment == 1]
    both = row.part([*range(row.segments.count(0)), *twice, *twice])
    segments = [0] * row.segments.count(0) + [1] * len(twice) + [2] * len(twice)
    batch = scoring.collate([replace(both, segments=segments)] * 2)
    torch.manual_seed(3)
    scores = Scorer(model, scoring).class_logits(batch)
    torch.testing.assert_close(scores[:, 0], scores[:, 1])
    assert (scores[0] - scores[1]).abs().max() > 1e-3, "two questions, two draws"


def test_a_model_whose_answers_depend_on_the_rows_beside_is_refused() -> None:
    # rotary frequencies that follow the longest row of a batch
    rope = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 100.0}
    config = transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 32}, rope_parameters=rope)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    scoring = Letters(TOKENIZER)
    rows = [scoring.encode(row) for row in (questions(1)[0], Example("long", "red or blue? " * 12, ("A", "B"), 0))]
    with pytest.raises(UserError, match="otherwise when others stand beside it .*--max-length"):
        predict(Scorer(model, scoring), rows, MeanPredictive())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_not_taken_for_another_reading(dtype: torch.dtype) -> None:
    # of 24 layers: what padding and another batch change by rounding alone
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 24})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    scoring = Continuation(TOKENIZER)
    assert Scorer(model, scoring).reads_packed([scoring.encode(row) for row in questions(4)])
    hybrid = model_of("lfm2").to(dtype)
    assert not Scorer(hybrid, scoring).reads_packed([scoring.encode(row) for row in questions(4)])


def test_a_row_beyond_the_positions_that_a_model_has_learnt_is_refused() -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48}
    config = transformers.GPT2Config(vocab_size=310, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    scoring = Letters(TOKENIZER, labels=("yes", "no"), template="{text}")
    fitting, longer = (Example("x", "red " * n + "?", ("yes", "no"), 0) for n in (10, 60))
    scorer = Scorer(model, scoring)
    found = predict(scorer, [scoring.encode(fitting)], MeanPredictive())[0, 0]
    torch.testing.assert_close(found, alone(model, scoring, fitting), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="more than the 48 that the model has positions for"):
        predict(scorer, [scoring.encode(longer)], MeanPredictive())
