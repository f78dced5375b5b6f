"""Shared prompts: rows behind a prefix that was encoded once have the answers of whole rows."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_base import ARCHITECTURES, adapted, loaded, perturb, questions
from torch import Tensor

import scalabl
from scalabl.inference.classifier import Classifier
from scalabl.methods.temperature import TemperedPredictive
from scalabl.predictive import LinearizedPredictive, MeanPredictive, MonteCarloPredictive, Predictive, predict
from scalabl.predictive.adaptive import AdaptivePredictive
from scalabl.scoring import Batch, Continuation, Encoded, Letters, Scorer, Scoring
from scalabl.scoring import scorer as scorer_module
from scalabl.scoring.prefix import common_length, shared_prefix
from scalabl.scoring.reading import CACHE
from scalabl.scoring.trunk import Trunk
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.tuner import stochastic_layers

INSTRUCTION = "Answer with the word that is right.\nQuestion: which is a colour?\nAnswer: blue\n\n"


def scoring_of(kind: str) -> Scoring:
    _, tokenizer = loaded()
    made: Scoring = Letters(tokenizer) if kind == "letters" else Continuation(tokenizer)
    return made.with_prefix(INSTRUCTION)


class Whole:
    """The same predictive, given whole rows."""

    name = "whole"

    def __init__(self, inner: Predictive) -> None:
        self.inner = inner

    def __call__(self, scorer: Scorer, batch: Batch) -> Tensor:
        assert batch.prefix is None
        return self.inner(scorer, batch)


def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Rows, tokens and prefix tokens of every pass from now on."""
    from scalabl.scoring import prefix as prefix_module

    seen: list[tuple[int, int, int]] = []
    original = scorer_module.token_logits

    def token_logits(model: torch.nn.Module, batch: Batch, *args: object, **kwargs: object) -> Tensor:
        seen.append((*batch.input_ids.shape, batch.prefix.length if batch.prefix else 0))  # type: ignore[arg-type]
        return original(model, batch, *args, **kwargs)  # type: ignore[arg-type]

    for module in (scorer_module, prefix_module):
        monkeypatch.setattr(module, "token_logits", token_logits)
    return seen


def same(scorer: Scorer, rows: list[Encoded], make: Callable[[], Predictive], batch_size: int = 3) -> None:
    found = predict(scorer, rows, make(), batch_size=batch_size)
    assert scorer.shares_prefix
    expected = predict(scorer, rows, Whole(make()), batch_size=batch_size)
    torch.testing.assert_close(found.exp(), expected.exp(), atol=2e-5, rtol=1e-4)
    assert torch.equal(found == -torch.inf, expected == -torch.inf)


@pytest.mark.parametrize("kind", ["letters", "continuation"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mean_and_particles_equal_those_of_whole_rows(architecture: str, kind: str) -> None:
    scoring = scoring_of(kind)
    rows = [scoring.encode(row) for row in questions(7)]
    for last in (None, 2):  # all layers, and behind a frozen trunk
        model = adapted(architecture, last=last)
        for trunk in (None, Trunk(model)):
            same(Scorer(model, scoring, trunk), rows, MeanPredictive)
            same(Scorer(model, scoring, trunk), rows, lambda: MonteCarloPredictive(4, seed=3))
    same(Scorer(model, scoring, trunk), rows, lambda: MonteCarloPredictive(3, chunk=2, stochastic_layers="last:1"))
    same(Scorer(model, scoring, trunk), rows, lambda: AdaptivePredictive(MonteCarloPredictive(9, seed=1), 0.8))
    same(Scorer(model, scoring, trunk), rows, lambda: TemperedPredictive(MonteCarloPredictive(2), 1.7))


@pytest.mark.parametrize("window", [8, 40])
def test_sliding_windows_reach_into_the_prefix(window: int) -> None:
    model = adapted("gemma3")
    model.config.sliding_window = window
    scoring = scoring_of("continuation")
    rows = [scoring.encode(row) for row in questions(5)]
    assert min(len(row.input_ids) for row in rows) > window
    same(Scorer(model, scoring), rows, lambda: MonteCarloPredictive(2))


def test_only_stochastic_top_layers_and_an_output_layer() -> None:
    scoring = scoring_of("continuation")
    rows = [scoring.encode(row) for row in questions(5)]
    above: list[dict[str, Any]] = [{"stochastic_layers": "last:1"}, {"target_modules": ["lm_head"]}]
    for config in (*above, {"target_modules": ["v_proj", "lm_head"]}):
        model = adapted(**config)
        same(Scorer(model, scoring, Trunk(model)), rows, lambda: MonteCarloPredictive(3))


def test_noise_on_a_of_a_rival() -> None:
    from scalabl.predictive.lora_particles import DropoutPredictive

    base, _ = loaded()
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    scoring = scoring_of("letters")
    rows = [scoring.encode(row) for row in questions(5)]
    same(Scorer(model, scoring, Trunk(model)), rows, lambda: DropoutPredictive(0.5, samples=3))


def test_stored_trunks_are_cut_too(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("SCALABL_CACHE", str(tmp_path))
    model, scoring = adapted(last=1), scoring_of("continuation")
    scorer = Scorer(model, scoring, Trunk(model))
    rows = with_stored_trunk(scorer, [scoring.encode(row) for row in questions(6)])
    assert rows[0].trunk is not None
    same(scorer, rows, lambda: MonteCarloPredictive(3))


def test_the_prefix_is_encoded_once_a_particle(monkeypatch: pytest.MonkeyPatch) -> None:
    model, scoring = adapted(), scoring_of("continuation")
    rows = [scoring.encode(row) for row in questions(7)]
    scorer = Scorer(model, scoring, Trunk(model))
    predict(scorer, rows, MeanPredictive())  # the model is found to agree
    seen = passes(monkeypatch)
    predict(scorer, rows, MonteCarloPredictive(4, chunk=2), batch_size=3)
    length = common_length(rows)
    assert length > 40
    assert [(n, t) for n, t, before in seen if not before] == [(2, length), (2, length)]
    behind = [(n, before) for n, _, before in seen if before]
    assert behind == [(6, length)] * 4 + [(2, length)] * 2  # 2 particles of 3, 3 and 1 rows, twice
    assert max(t for _, t, before in seen if before) + length == max(len(row.input_ids) for row in rows)


def test_a_prefix_that_is_short_or_of_a_single_row_is_not_shared() -> None:
    model = adapted()
    _, tokenizer = loaded()
    plain, scorer = Continuation(tokenizer), Scorer(model, Continuation(tokenizer))
    rows = [plain.encode(row) for row in questions(5)]
    assert common_length(rows) < 16 and shared_prefix(scorer, rows) is None
    long = scoring_of("continuation")
    assert shared_prefix(scorer, [long.encode(questions(1)[0])]) is None
    # less than a fifth of the rows: a pass of its own is not worth it
    wide = Continuation(tokenizer, max_length=4096).with_prefix(INSTRUCTION)
    for words, shared in ((3, True), (300, False)):
        much = [wide.encode(replace(row, question=f"{row.question} {'red ' * words}")) for row in questions(2)]
        assert common_length(much) >= 49
        assert (shared_prefix(scorer, much) is not None) == shared


def test_every_row_keeps_a_token_of_its_prompt() -> None:
    scoring = scoring_of("continuation")
    row = questions(1)[0]
    rows = [scoring.encode(row), scoring.encode(replace(row, choices=("red", "no")))]  # the same prompt
    scorer = Scorer(adapted(), scoring)
    prefix = shared_prefix(scorer, rows)
    assert prefix is not None and prefix.length == rows[0].segments.count(0) - 1
    assert [prefix.cut(r).segments[0] for r in rows] == [0, 0]
    assert all(prefix.begins(r) for r in rows)
    same(scorer, rows, lambda: MonteCarloPredictive(2))


def test_a_model_that_answers_otherwise_behind_a_prefix_is_run_whole() -> None:
    scoring = scoring_of("continuation")
    rows = [scoring.encode(row) for row in questions(4)]
    model = adapted()
    attention = model.get_base_model().model.layers[1].self_attn
    whole = attention.forward

    def without_cache(hidden_states: Tensor, *, attention_mask: Tensor, **others: Any) -> Any:
        mask = attention_mask[..., -hidden_states.shape[1] :]
        return whole(hidden_states, attention_mask=mask, **{**others, CACHE: None})

    def without_cache_of_this_kind(*_: Any, **__: Any) -> Any:
        if __[CACHE] is not None:
            raise AttributeError("this model has a cache of its own")
        return whole(*_, **__)

    expected = predict(Scorer(model, scoring), rows, Whole(MonteCarloPredictive(2)))
    for forward in (without_cache, without_cache_of_this_kind):
        attention.forward = forward
        scorer = Scorer(model, scoring)
        assert torch.equal(predict(scorer, rows, MonteCarloPredictive(2)), expected)
        assert scorer.shares_prefix is False


def test_the_linearised_predictive_gets_whole_rows() -> None:
    # its Jacobian goes through the prefix as well
    scoring = scoring_of("continuation")
    rows = [scoring.encode(row) for row in questions(3)]
    scorer = Scorer(adapted(), scoring)
    expected = predict(scorer, rows, Whole(LinearizedPredictive(8)))
    assert torch.equal(predict(scorer, rows, LinearizedPredictive(8)), expected)
    assert scorer.shares_prefix is None


def classifier(prefix: str = INSTRUCTION) -> Classifier:
    return Classifier(adapted(), Continuation(loaded()[1]), samples=3, prefix=prefix)


def test_a_classifier_keeps_its_prefix_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made, rows = classifier(), questions(3)
    whole = classifier("")
    whole.scorer.scoring = whole.scorer.scoring.with_prefix(INSTRUCTION)
    whole.predictive = Whole(whole.predictive)
    made(rows[:1])
    seen = passes(monkeypatch)
    for row in rows:  # one at a time: nothing is shared within a call
        torch.testing.assert_close(
            torch.tensor(made([row]).probs), torch.tensor(whole([row]).probs), atol=2e-5, rtol=1e-4
        )
    behind = [before for n, t, before in seen if before]
    assert len(behind) == 3 and len(set(behind)) == 1 and behind[0] > 40
    assert sum(t == behind[0] for n, t, before in seen if not before) == 0, "the prefix was encoded again"


@pytest.mark.parametrize("change", ["weights", "predictive"])
def test_what_was_kept_is_forgotten_when_it_is_no_longer_true(change: str) -> None:
    made, rows = classifier(), questions(1)
    before = made(rows).probs
    if change == "weights":
        with torch.no_grad():
            for leaf in stochastic_layers(made.scorer.model).values():
                leaf.posterior.log_mean.add_(0.5)
    else:
        made.predictive = MonteCarloPredictive(3, seed=8)
    found = made(rows).probs
    predictive = Whole(made.predictive)
    expected = predict(made.scorer, [made.scorer.scoring.encode(row) for row in rows], predictive).exp().mean(0)
    torch.testing.assert_close(torch.tensor(found), expected, atol=2e-5, rtol=1e-4)
    assert abs(found - before).max() > 1e-3


def test_a_prefix_changes_the_answer_and_can_be_short() -> None:
    rows = questions(3)
    assert abs(classifier()(rows).probs - classifier("")(rows).probs).max() > 1e-3
    short = classifier("Say: ")
    assert short(rows).probs.shape == (3, 5)
    assert short.scorer.scoring.prompt_ids("x") != Continuation(loaded()[1]).prompt_ids("x")


def test_memory_counts_the_prefix() -> None:
    from scalabl.predictive.monte_carlo import bytes_per_particle

    scoring = scoring_of("continuation")
    scorer = Scorer(adapted(), scoring)
    rows = [scoring.encode(row) for row in questions(4)]
    prefix = shared_prefix(scorer, rows)
    assert prefix is not None
    cut = scoring.collate([prefix.cut(row) for row in rows])
    assert bytes_per_particle(scorer.model, cut) < bytes_per_particle(scorer.model, replace(cut, prefix=prefix))


def test_particles_stay_in_their_rows() -> None:
    # rows i B .. (i + 1) B - 1 carry particle i, behind the prefix of particle i
    model, scoring = adapted(), scoring_of("continuation")
    perturb(model)
    rows = [scoring.encode(row) for row in questions(3)]
    found = predict(Scorer(model, scoring), rows, MonteCarloPredictive(3, seed=2))
    for i in range(3):
        with scalabl.particles(model, 1, seed=2, first=i), torch.no_grad():
            for j, row in enumerate(rows):
                alone = Scorer(model, scoring).class_log_probs(scoring.collate([row]))[0]
                torch.testing.assert_close(found[i, j, : row.num_choices], alone, atol=1e-4, rtol=1e-4)
