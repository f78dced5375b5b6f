"""Trainer, leaf and callback together against a posterior that is known in closed form."""

from pathlib import Path

import torch
from peft import get_peft_model
from tiny_run import arguments
from torch import Tensor, nn
from transformers import Trainer, default_data_collator

import scalabl
from scalabl.training.callback import ELBOCallback
from scalabl.tuner import stochastic_layers

NOISE, ROWS = 0.5, 24


class LinearRegression(nn.Module):
    """y = W0 x + noise; the loss is the mean over rows of -log p(y | x) up to a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.layer(x[:, None])[:, 0]  # (rows, one position, features)
        return {"loss": (y - out).square().sum(dim=1).mean() / (2 * NOISE**2)}


def test_vi_recovers_the_exact_posterior_of_bayesian_linear_regression(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LinearRegression()
    base.layer.weight.data.zero_()
    model = get_peft_model(
        base, scalabl.ScalaBLConfig(r=2, lora_alpha=2, target_modules=["layer"], prior_mean=0.0, prior_std=0.7)
    )
    (leaf,) = stochastic_layers(model).values()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.eye(2))  # s_j acts on output j alone: the exact posterior has no correlations
        parameter.requires_grad_("posterior" in name)

    x = torch.randn(ROWS, 4)
    features = x @ leaf.rows().detach().T  # (ROWS, 2)
    y = features * torch.tensor([1.2, 0.6]) + NOISE * torch.randn(ROWS, 2)
    precision = 1 / 0.7**2 + features.square().sum(dim=0) / NOISE**2
    exact_mean = (features * y).sum(dim=0) / NOISE**2 / precision
    assert (exact_mean > 3 * precision.rsqrt()).all()  # the means are positive, as the parametrisation wants them

    # each row many times in a batch: its expectation over s with less noise, and still a mean over ROWS rows
    data = [{"x": x[i], "y": y[i]} for i in range(ROWS)] * 20
    args = arguments(
        tmp_path,
        per_device_train_batch_size=len(data),
        max_steps=250,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        remove_unused_columns=False,
        label_names=["y"],
    )
    callback = ELBOCallback(ROWS, learning_rate=0.05)
    Trainer(model, args, train_dataset=data, data_collator=default_data_collator, callbacks=[callback]).train()
    torch.testing.assert_close(leaf.posterior.mean.detach(), exact_mean, rtol=0.01, atol=0)
    torch.testing.assert_close(leaf.posterior.marginal_std().detach(), precision.rsqrt(), rtol=0.03, atol=0)
