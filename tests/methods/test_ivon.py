"""IVON against its own equations: what its noise and its variance are, averaged batches, resuming, what is saved."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_base import loaded
from torch import Tensor

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.methods import ivon
from scalabl.predictive import MeanPredictive, predict
from scalabl.predictive.lora_particles import WeightNoisePredictive, lora_matrices
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_method
from scalabl.runs.settings import Settings, make_settings
from scalabl.scoring.scorer import Scorer
from scalabl.training.run import train

pytest.importorskip("ivon")
method: Any = load_method("ivon")
ROWS = 40


def optimizer_of(**settings: Any) -> tuple[Any, Any]:
    of = make_settings({"method": "ivon", "target_modules": "q_proj", "layers": "last:1", **settings})
    base, _ = loaded()
    model = get_peft_model(base, method.adapter_config(of, base))
    return model, method.optimizer(of, model, ROWS)


def test_the_first_standard_deviation_is_the_setting_and_ess_is_rows_over_beta() -> None:
    for decay in (0.0, 0.01):
        model, optimizer = optimizer_of(init_sigma=0.05, beta=0.01, weight_decay=decay)
        (group,) = optimizer.param_groups
        assert group["ess"] == ROWS / 0.01 and group["weight_decay"] == decay
        std = method.beside(SimpleNamespace(optimizer=optimizer, model=model))
        assert set(std) == set(lora_matrices(model))
        assert all(torch.allclose(part, torch.tensor(0.05)) for part in std.values())


def test_the_optimisers_noise_has_the_variance_that_is_saved() -> None:
    """theta = m + noise with variance 1 / (ess (h + delta)), number by number."""
    model, optimizer = optimizer_of(weight_decay=0.02)
    (group,) = optimizer.param_groups
    generator = torch.Generator().manual_seed(0)
    group["hess"] = 0.001 + torch.rand(group["hess"].shape, generator=generator)
    std = method.beside(SimpleNamespace(optimizer=optimizer, model=model))
    flat = torch.cat([part.flatten() for part in std.values()])
    torch.testing.assert_close(flat, (1 / (group["ess"] * (group["hess"] + 0.02))).sqrt())
    weights = lora_matrices(model)
    mean = {name: matrix.weight.detach().clone() for name, matrix in weights.items()}
    torch.manual_seed(0)
    number, draws = 3000, []
    for _ in range(number):
        with optimizer.sampled_params():
            draws.append(torch.cat([(weights[name].weight.detach() - mean[name]).flatten() for name in std]))
    standard = torch.stack(draws) / flat
    assert standard.mean(0).abs().max() < 5.5 / math.sqrt(number)
    assert (standard.std(0) - 1).abs().max() < 5.5 / math.sqrt(2 * number)
    assert all(torch.equal(weights[name].weight, mean[name]) for name in mean)


class _Trainer:
    """A trainer's step whose loss is linear in the weights, so that its gradient is the batch's numbers."""

    def __init__(self, model: Any, optimizer: Any, batches: int) -> None:
        self.model, self.optimizer, self.current_gradient_accumulation_steps = model, optimizer, batches
        self.state = SimpleNamespace(global_step=7)
        self.seen: list[Tensor] = []

    def training_step(self, model: Any, inputs: Tensor) -> Tensor:
        weights = [matrix.weight for matrix in lora_matrices(model).values()]
        flat = torch.cat([weight.flatten() for weight in weights])
        self.seen.append(flat.detach().clone())
        loss = (flat * inputs).sum() / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()


def test_accumulated_batches_are_averaged_each_at_its_own_draw() -> None:
    model, optimizer = optimizer_of()
    trainer: Any = method.trainer_class(_Trainer)(model, optimizer, batches=2)
    weights = [matrix.weight for matrix in lora_matrices(model).values()]
    mean = torch.cat([weight.detach().flatten() for weight in weights])
    batches = torch.randn(2, mean.numel(), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    for batch in batches:
        trainer.training_step(model, batch)
    assert optimizer.current_step == 7
    noise = torch.stack(trainer.seen) - mean
    assert (noise[0] - noise[1]).abs().max() > 0.01
    torch.testing.assert_close(torch.cat([w.grad.flatten() for w in weights]), batches.mean(0))
    torch.testing.assert_close(optimizer.state["avg_nxg"], (noise * batches).mean(0))
    # clipping a weight's gradient is clipping what the optimiser takes
    torch.nn.utils.clip_grad_norm_(weights, 1e-3)
    assert optimizer.state["avg_grad"].norm() < 1.001e-3
    optimizer.step()
    moved = torch.cat([weight.detach().flatten() for weight in weights]) - mean
    assert 0 < moved.abs().max() <= 1e-3 + 1e-7  # the learning rate


def test_it_learns_and_moves_the_variance(trained: Callable[..., Path]) -> None:
    directory = trained("ivon", steps=60)
    losses = [entry["loss"] for entry in json.loads((directory / "training_log.json").read_text()) if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    run = load_run(directory)
    std = torch.cat([part.flatten() for part in method.std(run).values()])
    assert (std - 0.03).abs().max() > 1e-6 and ((std > 0) & (std < 0.1)).all()
    assert run.record.parameters["variational"] == run.record.parameters["lora"] == std.numel()


@pytest.fixture
def run(trained: Callable[..., Path]) -> Run:
    return load_run(trained("ivon"))


def test_a_particle_is_a_draw_from_the_posterior(run: Run) -> None:
    strategy = run.predictive(samples=4000)
    assert isinstance(strategy, WeightNoisePredictive)
    std, noise = method.std(run), strategy.noise(run.scorer.model)
    assert noise.keys() == std.keys() == lora_matrices(run.scorer.model).keys()
    for name, values in noise.items():
        standard = values / std[name]
        assert standard.mean(0).abs().max() < 5.5 / math.sqrt(4000)
        assert (standard.std(0) - 1).abs().max() < 5.5 / math.sqrt(8000)


def test_a_particle_predicts_as_the_model_with_its_weights(run: Run, test_rows: list[Example]) -> None:
    strategy, rows = run.predictive(samples=3, seed=4), run.encode(test_rows)
    together = predict(run.scorer, rows, strategy)
    matrices, noise = lora_matrices(run.scorer.model), strategy.noise(run.scorer.model)  # type: ignore[attr-defined]
    mean = {name: matrix.weight.detach().clone() for name, matrix in matrices.items()}
    for n in range(3):
        for name, matrix in matrices.items():
            matrix.weight.data = mean[name] + noise[name][n]
        torch.testing.assert_close(together[n], predict(run.scorer, rows, MeanPredictive())[0], atol=2e-5, rtol=1e-5)


def test_its_mean_is_a_plain_lora(run: Run, trained: Callable[..., Path], test_rows: list[Example]) -> None:
    saved = load_file(trained("ivon") / "adapter_model.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name in saved)
    own = predict(run.scorer, run.encode(test_rows), run.predictive(samples=0))
    plain = Scorer(PeftModel.from_pretrained(loaded()[0], str(trained("ivon"))).eval(), run.scoring)
    torch.testing.assert_close(own, predict(plain, run.encode(test_rows), MeanPredictive()), atol=2e-5, rtol=0)
    drawn = predict(run.scorer, run.encode(test_rows), run.predictive(samples=2))
    assert (drawn.exp() - own.exp()).abs().max() > 1e-4


def test_a_run_that_was_stopped_ends_with_the_same_weights_and_variance(
    trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained("ivon", gradient_accumulation=2, save_steps=5)
    step = ivon._AtDraws.training_step

    def stop(self: Any, *args: Any) -> Tensor:
        if self.state.global_step == 8:
            raise KeyError("stopped")
        return step(self, *args)

    settings = Settings.flat(**json.loads((whole / "scalabl.json").read_text())["recipe"])
    stopped = whole.parent / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(ivon._AtDraws, "training_step", stop)
        train(settings, stopped)
    assert (stopped / "checkpoints" / "checkpoint-5").is_dir()
    train(settings, stopped)
    for name in ("adapter_model.safetensors", "ivon.safetensors"):
        one, other = load_file(whole / name), load_file(stopped / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_cannot_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, sentence in (
        ({"beta": 0.0}, "beta is 0"),
        ({"optimizer": "adafactor"}, "optimiser of its own"),
        ({"weight_decay": 10.0}, "allows no standard deviation"),
    ):
        with pytest.raises(UserError, match=sentence):
            optimizer_of(**settings)
    monkeypatch.setattr(ivon, "ivon", None)
    with pytest.raises(UserError, match="needs the package ivon-opt"):
        optimizer_of()


def test_another_adapters_variance_is_refused(run: Run, tmp_path: Path) -> None:
    run.directory, file = tmp_path, tmp_path / "ivon.safetensors"
    with pytest.raises(UserError, match="missing or altered"):
        run.predictive(samples=2)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="missing or altered"):
        run.predictive(samples=2)
    save_file({"a": torch.ones(1)}, file, metadata={"adapter_sha256": "0" * 64})
    with pytest.raises(UserError, match="another adapter"):
        run.predictive(samples=2)
    assert isinstance(run.predictive(samples=0), MeanPredictive)
