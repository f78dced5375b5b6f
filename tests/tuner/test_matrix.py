"""What holds for every architecture in every format of its base weights."""

import copy
import math
from pathlib import Path

import torch
from matrix import Architecture, Format, adapt, close, load_base, logits, perturb, replace_by_plain_lora, tokens
from peft import PeftModel
from torch import Tensor, nn

import scalabl
from scalabl.tuner import StochasticProjection, stochastic_layers
from scalabl.tuner.layers import keep_differentiable

Case = tuple[Architecture, Format]


def base_and_answer(case: Case, ids: Tensor) -> tuple[nn.Module, Tensor]:
    """The base model and its logits; the pass before it lets a format settle (4 bit packs its weights on first use)."""
    architecture, form = case
    base = load_base(architecture.name, form)
    logits(base, ids)
    return base, logits(base, ids)


def adapted(case: Case, **config: object) -> PeftModel:
    architecture, form = case
    return adapt(load_base(architecture.name, form), architecture, **config).eval()


def test_a_fresh_adapter_answers_exactly_as_its_base(case: Case) -> None:
    ids = tokens(3)
    base, answer = base_and_answer(case, ids)
    model = adapt(base, case[0], trained=False)
    assert len(stochastic_layers(model)) >= 4
    assert torch.equal(logits(model.eval(), ids), answer)
    with scalabl.sample(model):
        assert torch.equal(logits(model, ids), answer)


def test_two_equal_rows_get_draws_of_their_own_and_one_row_has_one(case: Case) -> None:
    model = adapted(case)
    ids = tokens(1).expand(2, -1)
    mean = logits(model, ids)
    assert torch.equal(mean[0], mean[1]), "the mean is one model"
    with scalabl.sample(model):
        torch.manual_seed(0)
        first, again = logits(model, ids), logits(model, ids)
        torch.manual_seed(0)
        same_seed = logits(model, ids)
    assert not close(first[0], first[1], 1e-3)
    assert not close(first, again, 1e-3)
    assert torch.equal(first, same_seed)


def test_evaluation_is_the_mean_and_draws_nothing(case: Case) -> None:
    model = adapted(case)
    ids = tokens(2)
    logits(model, ids)  # 4-bit weights settle
    before = torch.random.get_rng_state()
    answer = logits(model, ids)
    assert torch.equal(torch.random.get_rng_state(), before)
    with scalabl.mean(model):
        assert torch.equal(logits(model, ids), answer)
    assert torch.equal(logits(model, ids), answer)


def test_the_spread_of_a_layer_is_the_one_its_posterior_says(case: Case) -> None:
    """Var[B diag(s) A x] = (B diag(sigma) A x)^2 summed over the r numbers: proves that quantised bases are noisy."""
    architecture, form = case
    model = adapted(case)
    name, leaf = next(iter(stochastic_layers(model).items()))
    layer = model.get_submodule(f"base_model.model.{name}")
    x = torch.randn(1, 1, leaf.in_features, generator=torch.Generator().manual_seed(0)).to(form.dtype)
    draws = 4000
    torch.manual_seed(1)
    with torch.no_grad(), scalabl.sample(model):
        output = layer(x.expand(draws, 3, -1)).float()
    assert torch.equal(output[:, 0], output[:, 2]), "every token of a sequence has its sequence's draw"
    with torch.no_grad():
        projected = leaf.rows().float() @ x.float().flatten()
        matrix = layer.lora_B["default"].weight.float() * layer.scaling["default"]
        variance = (matrix * (leaf.posterior.marginal_std() * projected)).square().sum(dim=1)
    measured = output[:, 0].var(dim=0)
    # the relative standard error of a variance of n Gaussian draws is sqrt(2 / n); five of them, and rounding
    rounding = (output.abs().max() * 2**-8) ** 2 if form.dtype == torch.bfloat16 else 0.0
    assert ((measured - variance).abs() <= 5 * math.sqrt(2 / draws) * variance + 2 * rounding).all()


def test_particles_are_rows_and_chunks_agree_with_the_whole(case: Case) -> None:
    model = adapted(case)
    tolerance = case[1].tolerance
    ids = tokens(2)
    with scalabl.particles(model, 3, seed=4):
        whole = logits(model, ids.repeat(3, 1))
        assert torch.equal(whole, logits(model, ids.repeat(3, 1)))
    for particle in range(3):
        with scalabl.particles(model, 1, seed=4, first=particle):
            assert close(logits(model, ids), whole[2 * particle : 2 * particle + 2], tolerance)
    with scalabl.particles(model, 2, seed=4, indices=[2, 0]):
        swapped = logits(model, ids.repeat(2, 1))
    assert close(swapped, torch.cat([whole[4:6], whole[0:2]]), tolerance)
    with scalabl.particles(model, 3, seed=5):
        assert not close(logits(model, ids.repeat(3, 1)), whole, 10 * tolerance)


def test_a_particle_is_the_plain_lora_with_s_set_by_hand(case: Case) -> None:
    model = adapted(case)
    ids = tokens(2)
    with scalabl.particles(model, 1, seed=9, first=6):
        answer = logits(model, ids)
        s = {n: leaf.posterior.sample(leaf.state.noise)[0].detach() for n, leaf in stochastic_layers(model).items()}
    replace_by_plain_lora(model, s)
    assert not any(isinstance(module, StochasticProjection) for module in model.modules())
    assert close(logits(model, ids), answer, case[1].tolerance)


def test_merging_gives_the_mean_model(case: Case, tmp_path: Path) -> None:
    architecture, form = case
    model = adapted(case)
    ids = tokens(3)
    answer = logits(model, ids)
    model.save_pretrained(str(tmp_path))
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    merged_answer = logits(merged, ids)
    if not form.quantised:
        assert close(merged_answer, answer, form.tolerance)
    # a merged quantised base is rounded again: it must be the merge of the plain LoRA in mean/, rounding and all
    # (the two sums differ in their last bit, so a weight may fall on the other side of a rounding boundary)
    base = load_base(architecture.name, form)
    keep_differentiable(base)  # as every ScalaBL adapter has it: a CPU that packs 4-bit layers rounds them once more
    logits(base, ids)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "mean")).eval()
    assert close(logits(plain.merge_and_unload(), ids), merged_answer, max(form.tolerance, 1e-2 * form.quantised))
    assert close(merged_answer, answer, 0.5)


def test_save_and_load_give_the_same_answers(case: Case, tmp_path: Path) -> None:
    architecture, form = case
    model = adapted(case)
    ids = tokens(4)
    logits(model, ids)
    answer = logits(model, ids)
    with scalabl.particles(model, 2, seed=1):
        drawn = logits(model, ids)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(load_base(architecture.name, form), str(tmp_path)).eval()
    logits(loaded, ids)
    assert torch.equal(logits(loaded, ids), answer)
    with scalabl.particles(loaded, 2, seed=1):
        assert torch.equal(logits(loaded, ids), drawn)
    plain = PeftModel.from_pretrained(load_base(architecture.name, form), str(tmp_path / "mean")).eval()
    assert not any("posterior" in name for name, _ in plain.named_parameters())
    assert close(logits(plain, ids), answer, form.tolerance)


def test_disabling_the_adapter_gives_the_base(case: Case) -> None:
    ids = tokens(2)
    base, answer = base_and_answer(case, ids)
    model = adapt(base, case[0]).eval()
    assert not close(logits(model, ids), answer, 1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), answer)
    model.unload()
    assert torch.equal(logits(base, ids), answer)


def test_training_reaches_every_parameter_of_the_adapter_and_none_of_the_base(case: Case) -> None:
    model = adapted(case, covariance="full").train()
    ids = tokens(3)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".default." in name), name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, "autocast_adapter_dtype keeps adapters in float32"
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
            assert parameter.dim() >= 1, "sharding cannot split a number"


def test_generation_under_particles_uses_the_cache_rightly(case: Case) -> None:
    architecture, form = case
    model = adapted(case)
    ids = tokens(2, length=4)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with scalabl.particles(model, 3, seed=2):
        rows = ids.repeat(3, 1)
        out = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), min_new_tokens=4, **options)
        assert out.sequences.shape == (6, 8)
        whole = logits(model, out.sequences)
    step_by_step = torch.stack(out.logits, dim=1).float()
    assert close(step_by_step, whole[:, 3:7], form.tolerance)
    assert not close(whole[0], whole[2], 1e-3), "particles of one prompt differ"


def test_a_copy_is_independent(case: Case) -> None:
    model = adapted(case)
    ids = tokens(2)
    logits(model, ids)
    answer = logits(model, ids)
    twin = copy.deepcopy(model)
    perturb(twin, seed=77)
    assert torch.equal(logits(model, ids), answer)
    assert not close(logits(twin, ids), answer, 1e-3)
