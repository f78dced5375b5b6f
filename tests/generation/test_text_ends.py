"""Where a text ends: its figures are those of its own tokens, whatever else is in the batch."""

import pytest
import torch
from tiny_base import adapted, tiny_tokenizer
from transformers import GenerationConfig
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from scalabl.generation.answer import AnswerEnd, answer_span
from scalabl.generation.decoding import decode
from scalabl.predictive.monte_carlo import MonteCarloPredictive

PROMPTS = ["red blue green", "a long answer yes no", "stone"]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return adapted()


@pytest.fixture(params=["<pad>", "</s>"], ids=["own pad", "pad is end"])
def tokenizer(request):
    made = tiny_tokenizer()
    made.pad_token = request.param
    return made


class Says(LogitsProcessor):
    """Makes the first row say given tokens first."""

    def __init__(self, tokens, begin):
        self.tokens, self.begin = tokens, begin

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.begin
        if step < len(self.tokens):
            scores = scores.clone()
            scores[0] = -1e4
            scores[0, self.tokens[step]] = 0
        return scores


class EndsAt(StoppingCriteria):
    """Ends a row at a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == self.token


def same(one, other):
    assert one.token_ids == other.token_ids and one.finished == other.finished
    torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)
    for name in ("total", "aleatoric", "epistemic", "intersection"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["stop_strings", "stopping_criteria", "generation_config"])
@pytest.mark.parametrize("ends", [{}, {"eos_token_id": None}], ids=["end token", "none"])
def test_a_text_that_was_stopped_has_no_padding(model, tokenizer, kind, ends):
    draws = MonteCarloPredictive(3)
    [[free]] = decode(model, tokenizer, [PROMPTS[2]], draws, **GREEDY, **ends)
    place = next(i for i, piece in enumerate(free.tokens) if piece.isascii() and piece.isalpha())
    stop = {
        "stop_strings": {"stop_strings": free.tokens[place]},
        "stopping_criteria": {"stopping_criteria": [EndsAt(free.token_ids[place])]},
        "generation_config": {"generation_config": GenerationConfig(stop_strings=[free.tokens[place]])},
    }[kind]
    [[alone]] = decode(model, tokenizer, [PROMPTS[2]], draws, **GREEDY, **ends, **stop)
    assert alone.token_ids == free.token_ids[: place + 1] and alone.finished and not free.finished
    [*_, [among_others]] = decode(model, tokenizer, PROMPTS, draws, **GREEDY, **ends, **stop)
    same(alone, among_others)


def test_a_line_end_in_front_of_an_answer_is_no_end_of_it(model, tokenizer):
    draws, prompts = MonteCarloPredictive(3), PROMPTS[1:]
    line, red = tokenizer("\n")["input_ids"][-1], tokenizer(" red")["input_ids"][-1]
    begin = len(tokenizer(prompts[0])["input_ids"])
    settings = {
        "stopping_criteria": [AnswerEnd(tokenizer, ["", "\n"], begin)],
        "logits_processor": LogitsProcessorList([Says([line, red, line], begin)]),
    }
    [[alone]] = decode(model, tokenizer, prompts[:1], draws, **GREEDY, **settings)
    [[among_others], _] = decode(model, tokenizer, prompts, draws, **GREEDY, **settings)
    assert alone.token_ids == [line, red, line] and answer_span(alone).text == "red"
    same(alone, among_others)


def test_the_models_own_end_token_counts_where_a_configuration_has_none(model, tokenizer):
    draws = MonteCarloPredictive(3)
    [[free]] = decode(model, tokenizer, [PROMPTS[2]], draws, **GREEDY)
    saved = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [free.token_ids[2], 309]
        config = GenerationConfig(**GREEDY)
        [*_, [found]] = decode(model, tokenizer, PROMPTS, draws, generation_config=config)
    finally:
        model.generation_config.eos_token_id = saved
    assert found.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2]) + 1] and found.finished
