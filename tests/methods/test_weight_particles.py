"""Particles in plain LoRA layers: row j carries particle j // B, and it equals the model with those very weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.predictive.lora_particles import DropoutPredictive, dropout_masks, input_masks, lora_parts, weight_noise
from scalabl.runs.method import Run

N = 3


def class_logits(run: Run, rows: list[Example], copies: int = 1) -> Tensor:
    batch = run.scoring.collate(run.encode(rows)).repeat(copies)
    with torch.no_grad():
        return run.scorer.class_logits(batch)


def with_weights(run: Run, rows: list[Example], change: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Class logits with every A changed by hand."""
    parts = lora_parts(run.scorer.model)
    before = {name: part.a.detach().clone() for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.a.data = change(name, before[name])
        return class_logits(run, rows)
    finally:
        for name, part in parts.items():
            part.a.data = before[name]


def test_noise_on_a_is_that_models_prediction(mle: Run, test_rows: list[Example]) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = {
        f"{name}.lora_A": 0.2 * torch.randn(N, *part.a.shape, generator=generator)
        for name, part in lora_parts(mle.scorer.model).items()
    }
    with weight_noise(mle.scorer.model, noise):
        together = class_logits(mle, test_rows, copies=N).view(N, len(test_rows), -1)
    for n in range(N):
        alone = with_weights(mle, test_rows, lambda name, a, n=n: a + noise[f"{name}.lora_A"][n])  # type: ignore[misc]
        torch.testing.assert_close(together[n], alone, atol=2e-5, rtol=1e-5)
    assert (together[0] - together[1]).nan_to_num().abs().max() > 1e-4


def test_a_mask_of_the_input_drops_columns_of_a(mle: Run, test_rows: list[Example]) -> None:
    masks = {
        name: dropout_masks(N, part.a.shape[1], 0.3, seed=0, stream=name)
        for name, part in lora_parts(mle.scorer.model).items()
    }
    with input_masks(mle.scorer.model, masks):
        together = class_logits(mle, test_rows, copies=N).view(N, len(test_rows), -1)
    for n in range(N):
        alone = with_weights(mle, test_rows, lambda name, a, n=n: a * masks[name][n])  # type: ignore[misc]
        torch.testing.assert_close(together[n], alone, atol=2e-5, rtol=1e-5)


def test_the_model_is_as_before_after_the_context(mle: Run, test_rows: list[Example]) -> None:
    before = class_logits(mle, test_rows)
    parts = lora_parts(mle.scorer.model)
    for context, values in (
        (weight_noise, {f"{name}.lora_A": torch.ones(1, *part.a.shape) for name, part in parts.items()}),
        (input_masks, {name: torch.zeros(1, part.a.shape[1]) for name, part in parts.items()}),
    ):
        with pytest.raises(RuntimeError, match="inside"), context(mle.scorer.model, values):
            assert not torch.allclose(class_logits(mle, test_rows), before)
            raise RuntimeError("inside")
        assert torch.equal(class_logits(mle, test_rows), before)


def test_rows_that_are_no_multiple_of_the_particles_are_refused(mle: Run, test_rows: list[Example]) -> None:
    masks = {name: torch.ones(2, part.a.shape[1]) for name, part in lora_parts(mle.scorer.model).items()}
    with pytest.raises(UserError, match="cannot carry 2 particles"), input_masks(mle.scorer.model, masks):
        class_logits(mle, test_rows[:3])
    with pytest.raises(UserError, match="no LoRA layer"):
        lora_parts(nn.Linear(2, 2))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_bernoulli_and_keep_the_mean(p: float) -> None:
    masks = dropout_masks(2000, 50, p, seed=0, stream="a")
    assert masks.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert (masks == 0).float().mean().item() == pytest.approx(p, abs=0.01)
    columns = masks.mean(0)
    assert (columns - 1).abs().max() < 5 * (p / (1 - p) / 2000) ** 0.5
    assert not torch.equal(masks, dropout_masks(2000, 50, p, seed=0, stream="b"))
    assert torch.equal(masks[:7], dropout_masks(7, 50, p, seed=0, stream="a"))


def test_the_mean_over_many_masks_is_the_deterministic_layer(mle: Run) -> None:
    """An adapted layer alone is linear in its mask: the average over masks tends to the layer without dropout."""
    number = 4000
    name, part = next(iter(lora_parts(mle.scorer.model).items()))
    x = torch.randn(1, 2, part.a.shape[1], generator=torch.Generator().manual_seed(0))
    masks = DropoutPredictive(0.1, samples=number).masks(mle.scorer.model)[name]
    with torch.no_grad(), input_masks(mle.scorer.model, {name: masks}):
        dropped = part.down(x.repeat(number, 1, 1))
    deterministic = part.down(x)[0].detach()
    error = dropped.std(0) / number**0.5
    assert ((dropped.mean(0) - deterministic).abs() < 5 * error).all() and (dropped.std(0) > 0).all()


def test_a_probability_out_of_range_is_refused() -> None:
    for p in (0.0, 1.0, -0.1):
        with pytest.raises(UserError, match="between 0 and 1"):
            DropoutPredictive(p)
