"""What ELBOCallback does to a training with transformers' Trainer."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Recorder, arguments, largest_difference, rows, tiny_model, trainer, weights
from torch.distributions import Normal
from torch.distributions import kl_divergence as kl_divergence_of

import scalabl
from scalabl.posterior import DiagonalGaussian
from scalabl.training.callback import ELBOCallback
from scalabl.tuner import kl_divergence, prior_of, stochastic_layers


def final_weights(directory: Path, *, number: int = 8, covariance: str = "diagonal", **options: Any) -> dict[str, Any]:
    """Train in the mean state, which no noise separates, and return the weights."""
    model = tiny_model(covariance=covariance)
    with scalabl.mean(model):
        trainer(model, arguments(directory, **options), [ELBOCallback(number, learning_rate=0.05)]).train()
    return weights(model)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (2, 4)])
def test_invariant_to_how_a_global_batch_is_split(
    tmp_path: Path, covariance: str, batch: int, accumulation: int
) -> None:
    whole = final_weights(tmp_path, covariance=covariance)
    split = final_weights(
        tmp_path,
        covariance=covariance,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    assert largest_difference(whole, split) < 1e-5
    assert largest_difference(whole, weights(tiny_model(covariance=covariance))) > 0.01  # it went somewhere


def run_and_record(
    directory: Path, callback: ELBOCallback | None, *, state: str = "mean", **options: Any
) -> tuple[Recorder, Any]:
    model, recorder = tiny_model(), Recorder()
    context = scalabl.mean(model) if state == "mean" else contextlib.nullcontext()
    with context:
        callbacks = [recorder] if callback is None else [callback, recorder]
        trainer(model, arguments(directory, **options), callbacks).train()
    return recorder, model


def autograd_kl_gradient(model: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """d KL / d parameter at the recorded values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    model.zero_grad()
    kl_divergence(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if "posterior" in name}


def test_the_gradient_added_is_the_kls_over_n(tmp_path: Path) -> None:
    whole, model = run_and_record(tmp_path, ELBOCallback(5), max_grad_norm=0)
    likelihood, _ = run_and_record(tmp_path, None, max_grad_norm=0)
    for name, gradient in autograd_kl_gradient(model, whole.before[0]).items():
        added = whole.gradients[0][name] - likelihood.gradients[0].get(name, 0)
        torch.testing.assert_close(added, gradient / 5, rtol=1e-4, atol=2e-6)


def test_clipping_shortens_the_elbos_gradient_and_does_not_turn_it(tmp_path: Path) -> None:
    likelihood, _ = run_and_record(tmp_path, None, state="auto", max_grad_norm=0)
    norm = torch.stack([gradient.norm() for gradient in likelihood.gradients[0].values()]).norm()
    whole, _ = run_and_record(tmp_path, ELBOCallback(5), state="auto", max_grad_norm=0)
    for least, factor in ((0.25, 0.25), (4.0, 1.0)):
        clipped, _ = run_and_record(tmp_path, ELBOCallback(5), state="auto", max_grad_norm=float(least * norm))
        for name, gradient in whole.gradients[0].items():
            torch.testing.assert_close(clipped.gradients[0][name], factor * gradient, rtol=1e-4, atol=1e-6)


def test_the_forward_kl_takes_the_elbos_place_and_the_log_keeps_the_elbos(tmp_path: Path) -> None:
    options: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": 1}
    model, recorder = tiny_model(prior_mean=0.3, prior_std=0.5), Recorder()
    with scalabl.mean(model):
        run = trainer(model, arguments(tmp_path, **options), [ELBOCallback(5, kl="forward"), recorder])
        run.train()
    prior = prior_of(model)
    for step in range(4):
        for name, leaf in stochastic_layers(model).items():
            path = f"base_model.model.{name}.lora_A.default.posterior.log_std"  # no likelihood in the mean state
            posterior = leaf.posterior
            assert isinstance(posterior, DiagonalGaussian)
            with torch.no_grad():
                for parameter in ("log_mean", "log_std"):
                    value = recorder.before[step][path.replace("log_std", parameter)]
                    posterior.get_parameter(parameter).copy_(value)
            forward_kl = kl_divergence_of(Normal(prior.mean, prior.std), Normal(posterior.mean, posterior.std)).sum()
            (expected,) = torch.autograd.grad(forward_kl, [posterior.log_std])
            torch.testing.assert_close(recorder.gradients[step][path], expected / 5, rtol=1e-4, atol=1e-7)
    logged = [entry["elbo/kl"] for entry in run.state.log_history if "elbo/kl" in entry]
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in recorder.after[-1]:
                parameter.copy_(recorder.after[-1][parameter_name])
    assert logged[-1] == pytest.approx(kl_divergence(model).item(), rel=1e-6)


def test_the_empirical_priors_gradient_is_that_of_its_own_kl(tmp_path: Path) -> None:
    model, recorder = tiny_model(empirical_prior=True), Recorder()
    with scalabl.mean(model):
        trainer(model, arguments(tmp_path), [ELBOCallback(5), recorder]).train()
    for step in range(4):
        for name, gradient in autograd_kl_gradient(model, recorder.before[step]).items():
            if "log_std" in name:
                torch.testing.assert_close(recorder.gradients[step][name], gradient / 5, rtol=1e-4, atol=1e-7)


def test_beta_zero_is_the_likelihood_alone(tmp_path: Path) -> None:
    with_callback, _ = run_and_record(tmp_path, ELBOCallback(5, beta=0.0), state="auto")
    without, _ = run_and_record(tmp_path, None, state="auto")
    assert largest_difference(with_callback.gradients[0], without.gradients[0]) == 0


def test_the_schedule_follows_the_optimiser_steps(tmp_path: Path) -> None:
    # 16 rows in batches of 2 times 2: an epoch is 4 optimiser steps
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 8}
    recorder, model = run_and_record(tmp_path, ELBOCallback(5, schedule="minibatch"), **options)
    for step in range(8):
        share = 4 * 2 ** (step % 4) / 15
        name = next(name for name in recorder.gradients[step] if "log_std" in name)  # no likelihood in the mean state
        expected = autograd_kl_gradient(model, recorder.before[step])[name]
        torch.testing.assert_close(recorder.gradients[step][name], share / 5 * expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rate", [0.05, None])
def test_an_sgd_step_is_exactly_rate_times_factor_times_gradient(tmp_path: Path, rate: float | None) -> None:
    options = {"lr_scheduler_type": "linear", "weight_decay": 0.5}
    recorder, model = run_and_record(tmp_path, ELBOCallback(5, learning_rate=rate), state="auto", **options)
    assert recorder.rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    own_rate = 0.1 if rate is None else rate
    for step in range(4):
        factor = 1 - step / 4
        for name, before in recorder.before[step].items():
            gradient, after = recorder.gradients[step][name], recorder.after[step][name]
            if "posterior" in name:  # no weight decay here, and it would show
                expected = before - own_rate * factor * gradient
            else:
                expected = before - 0.1 * factor * (gradient + 0.5 * before)
            torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-7)


def test_the_optimisers_groups_are_those_of_a_run_without_the_callback(tmp_path: Path) -> None:
    options = {"optim": "adamw_torch", "weight_decay": 0.1}
    with_callback, _ = run_and_record(tmp_path, ELBOCallback(5), **options)
    without, _ = run_and_record(tmp_path, None, **options)
    sizes = [[len(group) for group in groups] for groups in with_callback.groups]
    assert sizes == [[len(group) for group in groups] for groups in without.groups]
    assert all(groups == with_callback.groups[0] for groups in with_callback.groups)


@pytest.mark.parametrize("schedule", ["elbo", "warmup", "minibatch"])
def test_an_interrupted_run_resumes_bit_for_bit(tmp_path: Path, schedule: Any) -> None:
    def run(directory: Path, resume: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        model = tiny_model()
        args = arguments(
            directory,
            optim="adamw_torch",
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            max_steps=6,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=3,
        )
        run = trainer(model, args, [ELBOCallback(16, schedule=schedule, warmup_fraction=1.0)])
        run.train(resume_from_checkpoint=resume)
        return weights(model), run.optimizer.state_dict()

    whole, whole_state = run(tmp_path / "whole")
    resumed, resumed_state = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert largest_difference(whole, resumed) == 0
    assert whole_state["param_groups"] == resumed_state["param_groups"]
    assert whole_state["state"].keys() == resumed_state["state"].keys()
    for key, state in whole_state["state"].items():
        for name in state:
            assert torch.equal(state[name], resumed_state["state"][key][name])


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_posterior_becomes_the_prior_where_the_data_has_no_say(tmp_path: Path, covariance: str) -> None:
    model = tiny_model(covariance=covariance, prior_mean=0.5, prior_std=0.3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False).zero_()
    callback = ELBOCallback(1, learning_rate=0.05)
    args = arguments(tmp_path, optim="adamw_torch", max_steps=150, lr_scheduler_type="cosine")
    trainer(model, args, [callback], rows(8)).train()
    for leaf in stochastic_layers(model).values():
        torch.testing.assert_close(leaf.posterior.mean, torch.full((4,), 0.5), rtol=0, atol=0.01)
        torch.testing.assert_close(leaf.posterior.marginal_std(), torch.full((4,), 0.3), rtol=0, atol=0.01)
    assert kl_divergence(model).item() < 1e-2


def test_a_second_training_with_the_same_callback_registers_one_group(tmp_path: Path) -> None:
    model, callback = tiny_model(), ELBOCallback(5)
    run = trainer(model, arguments(tmp_path), [callback])
    run.train()
    run.train()
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks
