"""Architectures of every kind generate as each particle of theirs reads the text, alone and beside other prompts."""

import pytest
import torch
from architectures import CONFIGS, SIZES, TOKENIZER, adapted
from peft import get_peft_model
from tiny_base import perturb
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.mamba import modeling_mamba

import scalabl
from scalabl.core.errors import UserError
from scalabl.generation.decoding import decode
from scalabl.predictive.monte_carlo import MonteCarloPredictive

TARGETS = {
    "bloom": ["query_key_value"], "falcon-alibi": ["query_key_value"], "mpt": ["Wqkv"], "mamba": ["in_proj"],
    "mamba2": ["in_proj"],
    "lfm2": ["q_proj", "in_proj"], "bamba": ["q_proj", "in_proj"], "jamba": ["q_proj", "in_proj"],
}  # fmt: skip
# older Transformers have caches of their own for these, made for as many rows as there are prompts
OWN_CACHE = ("bamba", "granite-moe-hybrid", "mamba", "mamba2") if hasattr(modeling_mamba, "MambaCache") else ()
PROMPTS = ["which word is red or blue?", "red"]


ROTARY = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 72},
    "dynamic": {"factor": 8.0},
}


@pytest.mark.parametrize("kind", ROTARY)
def test_a_longer_neighbour_does_not_turn_a_text_s_positions(kind: str) -> None:
    """These choose their frequencies by the longest position of a batch, which is beyond what padding is tried at."""
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **ROTARY[kind]}
    sizes = SIZES | {"max_position_embeddings": 72 if kind == "dynamic" else 512}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, rope_parameters=parameters), dtype=torch.float32)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    config = scalabl.ScalaBLConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    perturb(model)
    draws, prompts = MonteCarloPredictive(2, seed=1), ["red", "which word is red or blue? " * 8]
    [alone] = decode(model, TOKENIZER, prompts[:1], draws, max_new_tokens=4)[0]
    [beside] = decode(model, TOKENIZER, prompts, draws, max_new_tokens=4)[0]
    assert beside.token_ids == alone.token_ids
    torch.testing.assert_close(beside.log_probs, alone.log_probs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_has_the_log_probabilities_of_each_particle_alone(name: str, layers: list[int] | None) -> None:
    if layers and name not in ("lfm2", "bloom", "mamba"):
        pytest.skip("one of each kind")
    model = adapted(name, TARGETS.get(name, ["q_proj", "v_proj"]), layers_to_transform=layers)
    draws = MonteCarloPredictive(2, seed=1)
    if name in OWN_CACHE:
        with pytest.raises(UserError, match=r"do not generate together.*upgrade"):
            decode(model, TOKENIZER, PROMPTS, draws, max_new_tokens=3)
        return
    for prompt, (text,) in zip(PROMPTS, decode(model, TOKENIZER, PROMPTS, draws, max_new_tokens=3), strict=True):
        ids, answer = TOKENIZER(prompt)["input_ids"], text.token_ids
        for particle in range(2):
            with torch.no_grad(), scalabl.particles(model, 1, seed=1, first=particle):
                cached = name == "gemma3n"  # without a cache older Transformers read it wrongly
                out = model(input_ids=torch.tensor([ids + answer]), use_cache=cached)
            logits = out.logits[0, len(ids) - 1 : -1]
            expected = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
            torch.testing.assert_close(text.log_probs[particle], expected, atol=1e-4, rtol=1e-4)
        assert (text.log_probs[0] - text.log_probs[1]).abs().max() > 1e-4
