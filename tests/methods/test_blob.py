"""BLoB against its own equations: flipout's moments, the KL's gradient, the KL's step, what is saved and merged."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_base import loaded
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.inference.classifier import Classifier
from scalabl.methods.blob import KLStepCallback, cycle_steps, kl_step
from scalabl.posterior import Prior
from scalabl.predictive import predict
from scalabl.predictive.lora_particles import WeightNoisePredictive, lora_matrices
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_method
from scalabl.runs.settings import Settings
from scalabl.tuner.blob import BLoBConfig, BLoBProjection, blob_layers

R, D_IN = 3, 5


def leaf(std: float = 0.3, seed: int = 0) -> BLoBProjection:
    """A leaf whose sigmas differ, of about `std`."""
    torch.manual_seed(seed)
    made = BLoBProjection(torch.randn(R, D_IN), eps=0.05)
    with torch.no_grad():
        made.posterior.g.copy_((std * (0.5 + torch.rand(R, D_IN))).sqrt())
    return made


def drawn(made: BLoBProjection, x: Tensor, passes: int) -> Tensor:
    """(passes, rows, tokens, r) of passes in training."""
    made.train()
    torch.manual_seed(1)
    with torch.no_grad():
        return torch.stack([made(x) for _ in range(passes)])


def test_flipout_has_the_mean_and_the_covariance_of_the_gaussian_on_a() -> None:
    """E[A x] = M x; Cov((A x)_k, (A x')_k) = sum_i sigma_ki^2 x_i x'_i within a row; components are uncorrelated."""
    made, x = leaf(), torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(3))
    out = drawn(made, x, 40_000)
    mean, variance = x @ made.weight.T, made.posterior.std.square()
    error = (variance.max() * x.square().sum(-1).max() / 40_000).sqrt()
    torch.testing.assert_close(out.mean(0), mean.detach(), atol=5 * error.item(), rtol=0)
    centred = (out - mean).detach()
    for row in range(2):
        for one in range(3):
            for other in range(3):
                expected = torch.diag((variance * x[row, one] * x[row, other]).sum(-1))
                measured = torch.einsum("nk,nl->kl", centred[:, row, one], centred[:, row, other]) / len(out)
                scale = (variance @ x[row, one].square()).sqrt().max() * (
                    variance @ x[row, other].square()
                ).sqrt().max()
                torch.testing.assert_close(measured, expected.detach(), atol=0.03 * scale.item(), rtol=0)


def test_flipout_decorrelates_the_rows_of_a_batch() -> None:
    made = leaf()
    x = torch.randn(1, 1, D_IN, generator=torch.Generator().manual_seed(3)).expand(2, 1, D_IN)
    centred = drawn(made, x, 40_000)[:, :, 0] - (x @ made.weight.T)[0, 0].detach()
    assert not torch.equal(centred[0, 0], centred[0, 1])
    correlation = (centred[:, 0] * centred[:, 1]).mean(0) / centred.square().mean((0, 1))
    assert correlation.abs().max() < 0.03  # one shared E without signs would give 1


def test_each_row_has_the_passs_noise_with_signs_of_its_own() -> None:
    """Unit vectors as tokens read off the row's A: its noise is (sigma * E) * (t_b s_b^T), one E for all rows."""
    made, rows = leaf(), 64
    noise = drawn(made, torch.eye(D_IN).expand(rows, -1, -1), 1)[0].transpose(1, 2) - made.weight.detach()
    torch.testing.assert_close(noise.abs(), noise[:1].abs().expand(rows, -1, -1), atol=1e-5, rtol=1e-3)
    signs = noise.sign() * noise[0].sign()
    outer = signs[:, :, :1] * signs[:, :1, :] * signs[:, :1, :1]
    assert torch.equal(signs, outer)  # of rank one: a sign a row of A and a sign a column
    for ratio in (signs[:, :, 0] * signs[:, :1, 0], signs[:, 0, :] * signs[:, 0, :1]):
        flipped = (ratio[:, 1:] < 0).float().mean(0)
        assert ((flipped > 0.2) & (flipped < 0.8)).all()


def test_flipout_is_for_training_alone() -> None:
    made, x = leaf().eval(), torch.randn(4, 2, D_IN)
    torch.testing.assert_close(made(x), x @ made.weight.T)
    assert (made.train()(x) - x @ made.weight.T).abs().min() > 0


def test_a_frozen_adapter_gives_its_mean() -> None:
    made, x = leaf().train(), torch.ones(2, 3, D_IN)
    assert not torch.equal(made(x), made(x))
    made.requires_grad_(False)
    torch.testing.assert_close(made(x), x @ made.weight.T)


@pytest.mark.parametrize("prior_std", [0.2, 1.5])
def test_the_kl_and_its_gradient_are_torchs(prior_std: float) -> None:
    made, prior = leaf(), Prior(0.0, prior_std)
    kl = made.kl(prior)
    reference = kl_divergence(Normal(made.weight, made.posterior.std), Normal(0.0, prior_std)).sum()
    torch.testing.assert_close(kl, reference, rtol=1e-5, atol=1e-4)
    of_mean, of_g = torch.autograd.grad(reference, [made.weight, made.posterior.g])
    closed_mean, closed_g = made.kl_gradient(prior)
    torch.testing.assert_close(closed_mean, of_mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(closed_g, of_g, rtol=1e-4, atol=1e-4)


def test_sigma_starts_as_the_square_of_a_uniform_g() -> None:
    g = BLoBProjection(torch.zeros(200, 200), eps=0.05).posterior.g
    assert g.min() >= 0.05 / math.sqrt(2) * (1 - 1e-6) and g.max() <= 0.05
    assert g.mean().item() == pytest.approx(0.05 * (1 + 1 / math.sqrt(2)) / 2, rel=0.01)


def test_the_kls_step_is_gradient_descent_and_never_passes_its_minimum() -> None:
    prior, rate = Prior(0.0, 0.2), 1e-3
    made = leaf(0.05)
    weight, g = made.weight.detach().clone(), made.posterior.g.detach().clone()
    of_mean, of_g = made.kl_gradient(prior)
    kl_step(made, prior, rate)
    torch.testing.assert_close(made.weight.detach(), weight - rate * of_mean)
    torch.testing.assert_close(made.posterior.g.detach(), g - rate * of_g)
    with torch.no_grad():
        made.posterior.g[0] = torch.tensor([0.0, 1e-9, -1e-6, 2.0, -2.0])
    kl_step(made, prior, 0.5)
    after = made.posterior.g.detach()[0]
    lowest = math.sqrt(prior.std)
    assert after.isfinite().all()
    torch.testing.assert_close(after.abs(), torch.full((D_IN,), lowest))
    assert after[2] < 0 < after[1]


def test_steps_of_the_kl_alone_end_at_the_prior() -> None:
    made, prior = leaf(0.01), Prior(0.0, 0.2)
    for _ in range(3000):
        kl_step(made, prior, 1e-3)
    assert made.kl(prior).item() == pytest.approx(0, abs=1e-4)


def test_a_cycle_has_the_papers_length_and_its_weights_sum_to_one() -> None:
    assert cycle_steps(640, 4) == 1 + int(100 * 640 ** (math.pi / 8) / 4) == 317
    weights = [weight_of(step, cycle=20) for step in range(20)]
    assert sum(weights) == pytest.approx(1, rel=1e-5)
    ratios = [later / earlier for earlier, later in zip(weights, weights[1:], strict=False)]
    assert ratios == pytest.approx([2.0] * 19, rel=1e-3)
    assert weight_of(20, cycle=20) == pytest.approx(weights[0], rel=1e-3)
    assert weight_of(7, cycle=20, schedule="elbo") == pytest.approx(1 / 20, rel=1e-5)


def test_a_cycle_is_of_the_rows_that_all_processes_take_and_a_warm_up_as_long_as_its_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings.flat(batch_size=4, gradient_accumulation=2, schedule="warmup", kl_warmup=0.4)
    method = load_method("blob")
    for processes, rows in ((1, 8), (4, 32)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        (callback,) = method.callbacks(settings, 640)
        assert isinstance(callback, KLStepCallback)
        assert callback.cycle == cycle_steps(640, rows) and callback.warmup_fraction == 0.4


def weight_of(step: int, *, cycle: int, schedule: Any = "minibatch", learning_rate: float = 1e-6) -> float:
    """The weight of the KL at a step, read off the step's effect on M, at a learning-rate factor of 1/2."""
    model = adapted()
    (made, *_) = blob_layers(model).values()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.param_groups[0]["initial_lr"] = 1.0
    callback = KLStepCallback(cycle, learning_rate=learning_rate, schedule=schedule)
    callback._layers, callback._prior = {"layer": made}, Prior(0.0, 1e-4)
    before = made.weight.detach().double().clone()
    gradient = made.kl_gradient(callback._prior)[0].double()
    state: Any = type("State", (), {"global_step": step, "max_steps": 100})()
    args: Any = type("Args", (), {"learning_rate": 1.0})()
    made.weight.data, made.posterior.g.data = made.weight.data.double(), made.posterior.g.data.double()
    callback.on_optimizer_step(args, state, None, optimizer=optimizer)  # type: ignore[arg-type]
    moved = before - made.weight.detach().double()
    return (moved.flatten() @ gradient.flatten() / gradient.square().sum()).item() / (0.5 * learning_rate)


def adapted(**options: Any) -> PeftModel:
    base, _ = loaded()
    torch.manual_seed(4)
    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base, BLoBConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model.eval()


def test_an_adapter_is_saved_and_loaded_whole(tmp_path: Path) -> None:
    model = adapted(prior_std=0.3, init_eps=0.1)
    model.save_pretrained(str(tmp_path))
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rsplit(".lora_", 1)[1] for name in names} == {"A.weight", "A.posterior.g", "B.weight"}
    base, _ = loaded()
    again = PeftModel.from_pretrained(base, str(tmp_path))
    assert again.peft_config["default"].prior_std == 0.3  # type: ignore[union-attr]
    for name, one in blob_layers(model).items():
        other = blob_layers(again)[name]
        assert torch.equal(one.weight, other.weight) and torch.equal(one.posterior.g, other.posterior.g)
    ids = torch.arange(5, 25).view(2, 10)
    torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(str(tmp_path))
    other, _ = loaded(seed=7)
    with pytest.raises(UserError, match="another base model"):
        PeftModel.from_pretrained(other, str(tmp_path))


def test_options_out_of_range_are_refused() -> None:
    for options, words in (
        ({"prior_std": 0.0}, "prior std must be a positive"), ({"init_eps": -1.0}, "init_eps is -1.0"),
        ({"use_dora": True}, "option use_dora"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            BLoBConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no BLoB layer"):
        blob_layers(nn.Linear(2, 2))


@pytest.fixture
def blob(trained: Callable[..., Path]) -> Run:
    return load_run(trained("blob"))


def test_training_logs_the_kl_and_moves_g(blob: Run, trained: Callable[..., Path]) -> None:
    import json

    log = json.loads((trained("blob") / "training_log.json").read_text())
    added = {"elbo/kl", "elbo/sigma_mean", "elbo/kl_weight", "elbo/nll"}
    assert all(added <= entry.keys() for entry in log if "loss" in entry)
    g = torch.cat([made.posterior.g.flatten() for made in blob_layers(blob.scorer.model).values()])
    assert g.unique().numel() == g.numel() and ((g < 0.05 / math.sqrt(2)) | (g > 0.05)).any()
    recorded = blob.record.parameters
    assert recorded["variational"] == g.numel() and recorded["lora"] > g.numel()


def test_a_particle_is_a_draw_from_the_posterior(blob: Run) -> None:
    """The noise of particle n has standard deviation sigma in every number of A."""
    predictive = blob.predictive(samples=4000)
    assert isinstance(predictive, WeightNoisePredictive)
    for name, noise in predictive.noise(blob.scorer.model).items():
        sigma = blob_layers(blob.scorer.model)[name.removesuffix(".lora_A")].posterior.std
        standard = noise / sigma
        assert standard.mean(0).abs().max() < 5 / math.sqrt(4000)
        assert (standard.std(0) - 1).abs().max() < 5 / math.sqrt(8000)
        assert noise.shape[1:] == lora_matrices(blob.scorer.model)[name].weight.shape


def test_the_classifier_draws_from_it_too(trained: Callable[..., Path]) -> None:
    run, row = load_run(trained("blob")), Example("0", "red 1?", ("bee", "yes", "stone"), None)
    answer = Classifier.from_pretrained(trained("blob"), samples=5, seed=2)([row])
    own = predict(run.scorer, run.encode([row]), run.predictive(samples=5, seed=2))
    torch.testing.assert_close(torch.from_numpy(answer.particle_log_probs), own, atol=1e-5, rtol=0)
    assert answer.epistemic[0] > 0
