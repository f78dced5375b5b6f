"""Bayesian decoding: the average over particles is what is decoded, and nothing else changes."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_base import adapted, loaded, tiny_tokenizer
from transformers import TextStreamer
from transformers.generation import StoppingCriteria, StoppingCriteriaList

import scalabl
from scalabl.core.errors import UserError
from scalabl.generation.decoding import decode, intersection_probability, token_figures
from scalabl.generation.fan_out import EnsembleDraws, MeanDraws, averaged
from scalabl.metrics.uncertainty import decompose
from scalabl.predictive.lora_particles import DropoutPredictive
from scalabl.predictive.monte_carlo import MonteCarloPredictive
from scalabl.tuner import stochastic_layers

PROMPTS = ["red blue green", "stone", "a long answer yes no"]
GREEDY = {"max_new_tokens": 7, "do_sample": False}
SAMPLED = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(chat=False)


@pytest.fixture(scope="module", params=[("llama", None), ("llama", 1), ("gemma3", 2), ("qwen2", None)], ids=str)
def model(request):
    architecture, last = request.param
    return adapted(architecture, last=last)


def by_hand(model, ids, samples, steps, seed=3):
    """Greedy decoding of the average, every particle a row of its own through the whole model, without a cache."""
    log_probs = []
    for _ in range(steps):
        with torch.no_grad(), scalabl.particles(model, samples, seed=seed):
            step = model(input_ids=ids.repeat(samples, 1)).logits[:, -1].log_softmax(-1)
        token = step.exp().mean(dim=0).argmax()
        log_probs.append(step[:, token])
        ids = torch.cat([ids, token[None, None]], dim=1)
    return ids[0, -steps:].tolist(), torch.stack(log_probs, dim=1)


def test_it_decodes_the_average_of_whole_passes(model, tokenizer):
    for prompt in PROMPTS:
        [[found]] = decode(model, tokenizer, [prompt], MonteCarloPredictive(5, seed=3), eos_token_id=-1, **GREEDY)
        tokens, log_probs = by_hand(model, torch.tensor([tokenizer(prompt)["input_ids"]]), 5, 7)
        assert found.token_ids == tokens
        torch.testing.assert_close(found.log_probs, log_probs, rtol=1e-4, atol=1e-4)


def test_batch_and_single_prompts_agree(model, tokenizer):
    draws = MonteCarloPredictive(4, seed=0)
    together = decode(model, tokenizer, PROMPTS, draws, **GREEDY)
    for prompt, [answer] in zip(PROMPTS, together, strict=True):
        [[alone]] = decode(model, tokenizer, [prompt], draws, **GREEDY)
        assert alone.token_ids == answer.token_ids and alone.text == answer.text
        torch.testing.assert_close(alone.epistemic, answer.epistemic, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_one_particle_is_plain_generation(model, tokenizer, settings):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    with scalabl.particles(model, 1, seed=5):
        torch.manual_seed(0)
        plain = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **settings)
    torch.manual_seed(0)
    [[found]] = decode(model, tokenizer, [PROMPTS[0]], MonteCarloPredictive(1, seed=5), **settings)
    assert found.token_ids == plain[0, inputs["input_ids"].shape[1] :].tolist()
    assert float(found.epistemic.max()) == 0


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_without_noise_it_is_the_means_text(model, tokenizer, settings):
    saved = [leaf.posterior.log_std.clone() for leaf in stochastic_layers(model).values()]
    try:
        with torch.no_grad():
            for leaf in stochastic_layers(model).values():
                leaf.posterior.log_std.fill_(-60)
        torch.manual_seed(0)
        several = decode(model, tokenizer, PROMPTS, MonteCarloPredictive(6), **settings)
        torch.manual_seed(0)
        mean = decode(model, tokenizer, PROMPTS, MeanDraws(), **settings)
    finally:
        with torch.no_grad():
            for leaf, log_std in zip(stochastic_layers(model).values(), saved, strict=True):
                leaf.posterior.log_std.copy_(log_std)
    assert [a[0].text for a in several] == [a[0].text for a in mean]
    assert max(float(a[0].epistemic.max()) for a in several) < 1e-5


def test_steps_are_told_as_they_are_taken_and_end_texts(model, tokenizer):
    draws, steps = MonteCarloPredictive(3, seed=1), []
    limits = torch.tensor([2, 4, 3])

    def told(step):
        steps.append(step)
        return limits <= len(steps)

    found = [one for [one] in decode(model, tokenizer, PROMPTS[:3], draws, told=told, top=2, **GREEDY)]
    plain = [one for [one] in decode(model, tokenizer, PROMPTS[:3], draws, **GREEDY)]
    assert len(steps) == 4 and [len(one.token_ids) for one in found] == limits.tolist()
    for row, (one, other) in enumerate(zip(found, plain, strict=True)):
        assert one.token_ids == other.token_ids[: len(one.token_ids)] and one.finished
        for t, token in enumerate(one.token_ids):
            step = steps[t]
            assert int(step.token_ids[row]) == token == int(step.top_ids[row, 0])
            torch.testing.assert_close(step.log_probs[:, row], one.log_probs[:, t])
            torch.testing.assert_close(step.figures.epistemic[row], one.epistemic[t])
            torch.testing.assert_close(step.top_log_probs[row, 0], one.average_log_probs[t])


def test_figures_are_those_of_the_particles():
    log_probs = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    figures, split = token_figures(log_probs), decompose(log_probs)
    for name in ("total", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(figures, name).double(), getattr(split, name), rtol=1e-4, atol=1e-5)
    probability = intersection_probability(log_probs).exp()
    low, high = log_probs.exp().amin(0), log_probs.exp().amax(0)
    assert bool(((probability >= low - 1e-6) & (probability <= high + 1e-6)).all())
    torch.testing.assert_close(probability.sum(-1), torch.ones(3), rtol=1e-5, atol=1e-5)
    share = ((probability - low) / (high - low)).std(dim=-1)  # every token takes the same share of its own interval
    assert float(share.max()) < 1e-3


def test_intersection_of_equal_particles_is_their_entropy():
    one = torch.randn(1, 2, 30, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    figures = token_figures(one.repeat(4, 1, 1))
    torch.testing.assert_close(figures.intersection, figures.total, rtol=1e-4, atol=1e-5)
    assert float(figures.epistemic.abs().max()) < 1e-5


def test_several_texts_a_prompt_differ_and_a_seed_repeats_them(model, tokenizer):
    settings = {**SAMPLED, "num_return_sequences": 3, "temperature": 1.5}
    torch.manual_seed(4)
    first = decode(model, tokenizer, PROMPTS[:2], MonteCarloPredictive(3), **settings)
    torch.manual_seed(4)
    again = decode(model, tokenizer, PROMPTS[:2], MonteCarloPredictive(3), **settings)
    assert [[a.token_ids for a in answers] for answers in first] == [[a.token_ids for a in x] for x in again]
    assert len({tuple(answer.token_ids) for answer in first[0]}) > 1


def test_the_texts_of_a_prompt_share_its_keys_and_values(model, tokenizer):
    """The prompts' tokens pass once, and nothing else changes: a cache of one's own is not shared."""
    settings = {**SAMPLED, "num_return_sequences": 3, "eos_token_id": -1}
    entered = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _module, args: entered.append(tuple(args[0].shape)))
    found = []
    for own in ({}, {"use_cache": True}):
        torch.manual_seed(5)
        found.append(decode(model, tokenizer, PROMPTS, MonteCarloPredictive(4, seed=0), **settings, **own))
    handle.remove()
    length = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert entered[:2] == [(3, length - 1), (9, 1)]
    for shared, separate in zip(*(sum(texts, []) for texts in found), strict=True):
        assert shared.token_ids == separate.token_ids
        torch.testing.assert_close(shared.log_probs, separate.log_probs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(shared.epistemic, separate.epistemic, rtol=1e-3, atol=1e-5)


def test_stopping_criteria_and_streaming(model, tokenizer, capsys):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= length + 3)

    length = len(tokenizer(PROMPTS[0])["input_ids"])
    stop = StoppingCriteriaList([AfterThree()])
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    [[found]] = decode(
        model, tokenizer, [PROMPTS[0]], MonteCarloPredictive(4), stopping_criteria=stop, streamer=streamer, **GREEDY
    )
    assert len(found.token_ids) == 3 and found.total.shape == (3,)
    assert capsys.readouterr().out.strip() == tokenizer.decode(found.token_ids).strip()


def test_the_end_token_ends_a_text(model, tokenizer):
    [[free]] = decode(model, tokenizer, [PROMPTS[1]], MonteCarloPredictive(4), eos_token_id=-1, **GREEDY)
    end = free.token_ids[2]
    [[cut]] = decode(model, tokenizer, [PROMPTS[1]], MonteCarloPredictive(4), eos_token_id=end, **GREEDY)
    assert cut.token_ids == free.token_ids[: free.token_ids.index(end) + 1] and cut.finished and not free.finished


def test_dropout_masks_and_ensembles_are_draws_too(tokenizer):
    base, _ = loaded("llama")
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj", "o_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    members = []
    for name in ("one", "two"):
        model.set_adapter(name)
        with torch.no_grad():
            members.append(model(input_ids=ids).logits[0, -1].log_softmax(-1))
    [[found]] = decode(model, tokenizer, [PROMPTS[0]], EnsembleDraws(["one", "two"]), **GREEDY)
    torch.testing.assert_close(found.log_probs[:, 0], torch.stack(members)[:, found.token_ids[0]], rtol=1e-4, atol=1e-5)
    model.set_adapter("one")
    [[dropped]] = decode(model, tokenizer, [PROMPTS[0]], DropoutPredictive(0.3, samples=6), **GREEDY)
    assert dropped.log_probs.shape[0] == 6 and float(dropped.epistemic[0]) > 0


def test_logits_outside_are_untouched(model, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with averaged(model, MonteCarloPredictive(3)):
            inside = model(input_ids=ids).logits
        assert inside.shape == before.shape and not torch.equal(inside, before)
        assert torch.equal(model(input_ids=ids).logits, before)


def test_the_average_probability_of_a_token(model, tokenizer):
    [[found]] = decode(model, tokenizer, [PROMPTS[0]], MonteCarloPredictive(5), **GREEDY)
    torch.testing.assert_close(found.average_log_probs, found.log_probs.exp().mean(0).log(), rtol=1e-4, atol=1e-5)
    assert math.isclose(sum(map(len, found.tokens)), len(tokenizer.decode(found.token_ids)))


@pytest.mark.parametrize("extra", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_what_moves_rows_about_is_refused(model, tokenizer, extra):
    with pytest.raises(UserError, match="cannot be given"):
        decode(model, tokenizer, [PROMPTS[0]], MonteCarloPredictive(2), **GREEDY, **extra)


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="empty"):
        decode(model, tokenizer, [[]], MonteCarloPredictive(2), **GREEDY)
