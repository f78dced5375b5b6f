"""Continuation: the choices of a question in one row score as they would one by one."""

import math

import pytest
import torch
from tiny_base import ARCHITECTURES, adapted, loaded, questions
from torch import Tensor
from transformers import PreTrainedModel

import scalabl
from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.scoring import Continuation, Scorer
from scalabl.scoring.continuation import choice_log_likelihoods
from scalabl.scoring.scorer import make_scoring
from scalabl.scoring.trunk import token_logits
from scalabl.tuner import stochastic_layers


@torch.no_grad()
def one_by_one(model: PreTrainedModel, scoring: Continuation, row: Example) -> Tensor:
    """(C, 2): summed log-likelihood and number of tokens of each choice, each in a plain pass of its own."""
    prompt = scoring.prompt_ids(scoring.prompt(row))
    found = []
    for choice in row.choices:
        ids = scoring.continuation_ids(choice)
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        log_probs = logits.float().log_softmax(dim=-1)
        found.append([sum(log_probs[i, token].item() for i, token in enumerate(ids)), len(ids)])
    return torch.tensor(found)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_choices_equal_plain_passes_of_their_own(architecture: str) -> None:
    model, tokenizer = loaded(architecture)
    rows = questions(6)
    for kind in ("sum", "token"):
        scoring = Continuation(tokenizer, normalization=kind)
        batch = scoring.collate([scoring.encode(row) for row in rows])
        with torch.no_grad():
            scores = Scorer(model, scoring).class_logits(batch)
        assert scores.shape == (6, 5)
        for row, score in zip(rows, scores, strict=True):
            sums, counts = one_by_one(model, scoring, row).T
            expected = sums if kind == "sum" else sums / counts
            number = len(row.choices)
            torch.testing.assert_close(score[:number], expected, atol=1e-4, rtol=1e-5)
            assert (score[number:] == -torch.inf).all()


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
def test_sliding_windows_are_those_of_the_model(architecture: str, window: int | None) -> None:
    # rows of about 20 tokens: with a window of 6 the first tokens are out of a late token's sight
    if architecture == "mistral":
        from transformers import AutoModelForCausalLM, MistralConfig

        _, tokenizer = loaded()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = MistralConfig(vocab_size=310, num_hidden_layers=2, sliding_window=window, **sizes)
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model, tokenizer = loaded(architecture)
        assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
        model.config.sliding_window = window or 512
    scoring = Continuation(tokenizer, normalization="sum")
    rows = questions(4)
    with torch.no_grad():
        scores = Scorer(model, scoring).class_logits(scoring.collate([scoring.encode(row) for row in rows]))
    for row, score in zip(rows, scores, strict=True):
        expected = one_by_one(model, scoring, row)[:, 0]
        torch.testing.assert_close(score[: len(row.choices)], expected, atol=1e-4, rtol=1e-5)


def test_a_row_in_a_batch_scores_as_the_row_alone() -> None:
    model, tokenizer = loaded()
    scoring = Continuation(tokenizer)
    encoded = [scoring.encode(row) for row in questions(6)]
    assert len({len(row.input_ids) for row in encoded}) > 3
    with torch.no_grad():
        together = Scorer(model, scoring).class_log_probs(scoring.collate(encoded))
        for row, score in zip(encoded, together, strict=True):
            alone = Scorer(model, scoring).class_log_probs(scoring.collate([row]))[0]
            torch.testing.assert_close(score[: row.num_choices], alone, atol=1e-5, rtol=1e-5)


def test_probabilities_of_each_row_add_up_to_one_over_its_own_choices() -> None:
    model, tokenizer = loaded()
    scoring = Continuation(tokenizer)
    rows = questions(6, choices=(3, 4, 5))
    with torch.no_grad():
        probs = Scorer(model, scoring).class_log_probs(scoring.collate([scoring.encode(r) for r in rows])).exp()
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(6))
    assert [(row > 0).sum().item() for row in probs] == [3, 4, 5, 3, 4, 5]


def test_the_choices_of_a_question_share_one_draw() -> None:
    # a draw for each choice would make the row differ from every pass under one s
    model = adapted()
    _, tokenizer = loaded()
    scoring = Continuation(tokenizer, normalization="sum")
    encoded = scoring.encode(questions(1, choices=(4,))[0])
    batch = scoring.collate([encoded])
    leaves = stochastic_layers(model)
    drawn: dict[str, Tensor] = {}

    def record(name: str, leaf: torch.nn.Module) -> None:
        original = leaf.draw

        def draw(rows: int, device: torch.device) -> Tensor:
            drawn[name] = original(rows, device)
            return drawn[name]

        leaf.draw = draw

    for name, leaf in leaves.items():
        record(name, leaf)
    torch.manual_seed(3)
    with torch.no_grad(), scalabl.sample(model):
        packed = Scorer(model, scoring).class_logits(batch)[0]
    assert all(s.shape == (1, 4) for s in drawn.values())
    for name, leaf in leaves.items():
        leaf.draw = lambda rows, device, s=drawn[name]: s.expand(rows, -1)
    with torch.no_grad():
        under_that_s = one_by_one(model, scoring, questions(1, choices=(4,))[0])[:, 0]
    for leaf in leaves.values():
        del leaf.draw
    torch.testing.assert_close(packed, under_that_s, atol=1e-4, rtol=1e-5)
    with torch.no_grad():
        mean = Scorer(model, scoring).class_logits(batch)[0]
    assert (packed - mean).abs().max() > 1e-3


def test_the_output_layer_sees_the_needed_positions_alone_and_gives_the_same_logits() -> None:
    model, tokenizer = loaded()
    scoring = Continuation(tokenizer)
    rows = questions(4)
    batch = scoring.collate([scoring.encode(row) for row in rows])
    longest = max(sum(len(scoring.continuation_ids(c)) for c in row.choices) for row in rows)
    number = sum(len(scoring.continuation_ids(c)) for row in rows for c in row.choices)
    assert batch.keep == longest + 1 < batch.input_ids.shape[1]
    Scorer(model, scoring).reads_packed([scoring.encode(row) for row in rows])  # which has passes of its own
    seen: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape[:-1].numel()))
    with torch.no_grad():
        logits = Scorer(model, scoring).logits(batch)
        whole = token_logits(model, batch, None)
    hook.remove()
    assert seen == [number, 4 * batch.keep]
    at_rows, columns = scoring.positions(batch)
    cut = batch.input_ids.shape[1] - batch.keep
    torch.testing.assert_close(logits, whole[at_rows, columns - cut])


def test_sums_and_counts_on_a_distribution_that_is_known() -> None:
    # uniform logits: every token has -log V
    _, tokenizer = loaded()
    scoring = Continuation(tokenizer)
    row = Example("x", "q", ("red", "a long answer"), 0)
    batch = scoring.collate([scoring.encode(row)])
    lengths = [len(scoring.continuation_ids(choice)) for choice in row.choices]
    sums, counts = choice_log_likelihoods(torch.zeros(sum(lengths), 310), batch)
    assert counts[0].tolist() == lengths and lengths[0] != lengths[1]
    assert sums[0].tolist() == pytest.approx([-n * math.log(310) for n in lengths])
    by_token = scoring.class_logits(torch.zeros(sum(lengths), 310), batch).softmax(-1)
    assert by_token[0].tolist() == pytest.approx([0.5, 0.5])
    by_sum = Continuation(tokenizer, normalization="sum").class_logits(torch.zeros(sum(lengths), 310), batch)
    assert by_sum[0].softmax(-1)[0].item() > 0.99


def test_a_prompt_that_is_too_long_loses_its_beginning_but_not_its_bos() -> None:
    _, tokenizer = loaded()
    row = Example("x", "start " + "word " * 60 + "end", ("red", "blue"), 0)
    whole = Continuation(tokenizer).encode(row)
    clipped = Continuation(tokenizer, max_length=40).encode(row)
    assert len(whole.input_ids) > 40 == len(clipped.input_ids)
    assert clipped.input_ids[0] == tokenizer.bos_token_id
    assert clipped.input_ids[1:] == whole.input_ids[-39:]
    assert clipped.position_ids[0] == 0
    with pytest.raises(UserError, match="raise --max-length"):
        Continuation(tokenizer, max_length=2).encode(row)


def test_the_settings_make_the_same_scoring_again() -> None:
    _, tokenizer = loaded(chat=True)
    scoring = Continuation(tokenizer, normalization="sum", task_labels=True, chat=True, max_length=99)
    again = make_scoring(scoring.settings(), tokenizer)
    row = questions(1)[0]
    assert isinstance(again, Continuation)
    assert again.settings() == scoring.settings() and again.encode(row) == scoring.encode(row)
    with pytest.raises(UserError, match="sum or token"):
        Continuation(tokenizer, normalization="mean")  # type: ignore[arg-type]


def test_a_model_that_ignores_the_mask_is_read_choice_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded()
    scoring = Continuation(tokenizer, normalization="sum")
    row = questions(1, choices=(5,))[0]
    encoded = scoring.encode(row)
    forward = model.forward

    def causal_only(*args: object, **kwargs: object) -> object:
        return forward(*args, **{**kwargs, "attention_mask": None})  # type: ignore[dict-item, call-overload]

    monkeypatch.setattr(model, "forward", causal_only)
    scorer = Scorer(model, scoring)
    assert not scorer.reads_packed([encoded])
    scorer.check_packing(encoded)
    with torch.no_grad():
        scores = scorer.class_logits(scoring.collate([encoded]))[0]
    torch.testing.assert_close(scores, one_by_one(model, scoring, row)[:, 0], atol=1e-4, rtol=1e-5)


def test_a_model_that_stops_honouring_the_mask_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded()
    scoring = Continuation(tokenizer)
    encoded = scoring.encode(questions(1, choices=(5,))[0])
    Scorer(model, scoring).check_packing(encoded)
    forward = model.forward

    def causal_only(*args: object, **kwargs: object) -> object:
        ids = kwargs["input_ids"]
        return forward(*args, **{**kwargs, "attention_mask": torch.ones_like(ids)})  # type: ignore[dict-item, call-overload]

    monkeypatch.setattr(model, "forward", causal_only)
    with pytest.raises(UserError, match="does not keep choices in one row apart"):
        Scorer(model, scoring).check_packing(encoded)
