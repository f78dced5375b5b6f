"""What a base model's own generation_config.json asks for, and architectures whose cache is of another kind."""

import pytest
import torch
from peft import get_peft_model
from tiny_base import adapted, perturb, tiny_tokenizer
from transformers import AutoModelForCausalLM, FalconH1Config, GenerationConfig, Lfm2Config, MistralConfig
from transformers.generation import StoppingCriteria
from transformers.models.falcon_h1 import modeling_falcon_h1

import scalabl
from scalabl.core.errors import UserError
from scalabl.generation.decoding import decode
from scalabl.generation.fan_out import can_share
from scalabl.generation.generate import AnswerSampling, decoded_with_samples
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.runs.method import Run
from scalabl.runs.record import RunRecord
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.text import Text

PROMPTS = ["red blue green red blue green", "stone", "a long answer yes no"]
GREEDY = {"max_new_tokens": 7, "do_sample": False}
SAMPLED = {"max_new_tokens": 7, "do_sample": True, "eos_token_id": -1, "num_return_sequences": 3}
SIZES = {
    "vocab_size": 310, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OTHER_CACHES = {
    "window": (MistralConfig(**SIZES, sliding_window=4), "v_proj"),
    "convolutions": (Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]), "w1"),
    "state and attention in a layer": (
        FalconH1Config(**SIZES, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8),
        "v_proj",
    ),
}
OLDER_CACHE = "FalconHybridMambaAttentionDynamicCache"  # made for as many rows as there are prompts


@pytest.fixture
def model():
    return adapted()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def answers(model, tokenizer, sampling=None, **generation):
    run = Run(RunRecord({}, scoring={"chat": False}), Scorer(model, Text(tokenizer)), tokenizer)
    rows = decoded_with_samples(
        run, PROMPTS, MonteCarloPredictive(3), chat=None, stop=(), sampling=sampling or AnswerSampling(), max_new_tokens=7,  # noqa: E501
        **generation,
    )  # fmt: skip
    return [(answer.token_ids, [other.token_ids for other in others]) for _, answer, others in rows]


def test_defaults_of_a_model_change_no_answer(model, tokenizer):
    def both():
        torch.manual_seed(0)
        return answers(model, tokenizer, AnswerSampling(2))

    plain = both()
    model.generation_config.update(
        do_sample=True, temperature=0.2, top_k=2, repetition_penalty=1.7, no_repeat_ngram_size=1, min_p=0.4,
        typical_p=0.3, num_beams=2,
    )  # fmt: skip
    assert both() == plain


def test_further_answers_end_where_the_answer_does(model, tokenizer):
    class EndsBehind(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full(input_ids.shape[:1], input_ids.shape[1] >= length + 2)

    def sampled(**generation):
        torch.manual_seed(0)
        return [other for _, others in answers(model, tokenizer, AnswerSampling(4), **generation) for other in others]

    plain = sampled()
    length = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert {len(ids) for ids in sampled(stopping_criteria=[EndsBehind()])} == {2} != {len(ids) for ids in plain}
    end = next(token for ids in plain for token in ids[:-1] if tokenizer.decode([token]).isalpha())
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in plain]
    assert expected != plain
    for given in ({"eos_token_id": end}, {"generation_config": GenerationConfig(eos_token_id=end)}):
        assert sampled(**given) == expected
    letter = tokenizer.decode([end])
    for given in ({"stop_strings": [letter]}, {"generation_config": GenerationConfig(stop_strings=[letter])}):
        assert all(letter not in tokenizer.decode(ids[:-1]) for ids in sampled(**given))
    assert any(letter in tokenizer.decode(ids[:-1]) for ids in plain)


def test_a_configuration_of_the_callers_says_how_a_token_is_taken(model, tokenizer):
    config = GenerationConfig(do_sample=True, temperature=3.0)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(answers(model, tokenizer, generation_config=config))
    assert found[0] == found[1] != found[2]
    config = GenerationConfig(repetition_penalty=1.9)
    penalised = answers(model, tokenizer, generation_config=config)
    assert penalised == answers(model, tokenizer, repetition_penalty=1.9) != answers(model, tokenizer)


@pytest.mark.parametrize("extra", [
    {"generation_config": GenerationConfig(num_beams=2)}, {"guidance_scale": 1.5}, {"prefill_chunk_size": 2},
])  # fmt: skip
def test_what_moves_rows_or_passes_the_model_twice_is_refused(model, tokenizer, extra):
    with pytest.raises(UserError, match=f"{next(iter(extra)).replace('generation_config', 'num_beams')} cannot"):
        decode(model, tokenizer, PROMPTS[:1], MonteCarloPredictive(2), **GREEDY, **extra)


def shared_and_separate(model, tokenizer):
    found = []
    for own in ({}, {"use_cache": True}):
        torch.manual_seed(5)
        found.append(decode(model, tokenizer, PROMPTS, MonteCarloPredictive(2), **SAMPLED, **own))
    for one, other in zip(*(sum(texts, []) for texts in found), strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)
    return found[0]


def test_a_cache_that_the_model_asks_for_is_not_shared(model, tokenizer):
    plain = shared_and_separate(model, tokenizer)
    for settings in ({"cache_implementation": "static"}, {"cache_implementation": None, "use_cache": False}):
        model.generation_config.update(**settings)
        torch.manual_seed(5)
        found = decode(model, tokenizer, PROMPTS, MonteCarloPredictive(2), **SAMPLED)
        assert [[text.token_ids for text in row] for row in found] == [[text.token_ids for text in r] for r in plain]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])  # Transformers has renamed it
def test_a_cache_of_the_callers_own_is_not_shared(name, model):
    inputs = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert can_share(model, inputs, 2, {}) and not can_share(model, inputs, 2, {name: None})


@pytest.mark.parametrize("name", OTHER_CACHES)
def test_several_texts_of_models_with_other_caches(name, tokenizer):
    config, target = OTHER_CACHES[name]
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    adapter = scalabl.ScalaBLConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=[target])
    model = get_peft_model(base, adapter)
    perturb(model)
    if name == "state and attention in a layer" and hasattr(modeling_falcon_h1, OLDER_CACHE):
        with pytest.raises(UserError, match=r"do not generate together.*upgrade"):
            shared_and_separate(model.eval(), tokenizer)
        return
    shared_and_separate(model.eval(), tokenizer)
    draws = MonteCarloPredictive(2)
    together = decode(model, tokenizer, PROMPTS, draws, **GREEDY)
    for prompt, [found] in zip(PROMPTS, together, strict=True):
        [[alone]] = decode(model, tokenizer, [prompt], draws, use_cache=False, **GREEDY)
        assert alone.token_ids == found.token_ids
        torch.testing.assert_close(alone.log_probs, found.log_probs, rtol=1e-4, atol=1e-4)
