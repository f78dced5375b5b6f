"""What one rank of test_callback_distributed.py does.

`main(OUTPUT, BATCH)`: train with Trainer on BATCH rows a rank; then, for every posterior and prior of CASES, shard
with FSDP 2 and add the gradient of the KL alone. Writes weights, gradients and log values.
"""

import os
from pathlib import Path
from typing import Any

import torch
from tiny_run import arguments, tiny_model, trainer, weights

from scalabl.training.callback import ELBOCallback
from scalabl.training.kl import add_kl_gradients
from scalabl.tuner import prior_of, stochastic_layers

CASES: dict[str, dict[str, Any]] = {
    f"{covariance}, {'empirical' if empirical else 'fixed'} prior": {
        "covariance": covariance,
        "prior_mean": 0.2,
        "prior_std": 0.7,
        "empirical_prior": empirical,
    }
    for covariance in ("diagonal", "full")
    for empirical in (False, True)
}


def unlike(model: Any) -> Any:
    """The model with posteriors that differ from each other, correlations included."""
    generator = torch.Generator().manual_seed(4)
    for leaf in stochastic_layers(model).values():
        for parameter in leaf.posterior.parameters():
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


class Noise(ELBOCallback):
    """Also keeps the noise of the rank's first rows in one layer."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_train_begin(*args, **kwargs)
        state = torch.get_rng_state()
        leaf = next(iter(stochastic_layers(kwargs["model"]).values()))
        self.first_noise = leaf.draw(4, torch.device("cpu")).detach()
        torch.set_rng_state(state)


def ddp(output: Path, batch: int) -> dict[str, Any]:
    model, callback = tiny_model(), Noise(8, learning_rate=0.05)
    args = arguments(output / "run", per_device_train_batch_size=batch, ddp_backend="gloo", max_grad_norm=0.1)
    trainer(model, args, [callback]).train()
    return {"weights": weights(model), "noise": callback.first_noise}


def fsdp() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found = {}
    for case, config in CASES.items():
        model = unlike(tiny_model(**config))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        leaves = stochastic_layers(model)
        callback = ELBOCallback(8)
        callback._posteriors = {name: leaf.posterior for name, leaf in leaves.items()}
        callback._prior = prior_of(model)
        add_kl_gradients(callback._posteriors.values(), prior_of(model), 1 / 8)
        gradients = {}
        for name, leaf in leaves.items():
            for parameter_name, parameter in leaf.posterior.named_parameters():
                assert 0 < parameter.grad.to_local().numel() < parameter.numel()  # it is a shard
                gradients[f"{name}.{parameter_name}"] = parameter.grad.full_tensor()
        found[case] = {"gradients": gradients, "values": callback.log_values({"loss": 1.0})}
    return found


def main(output: Path, batch: int) -> None:
    from torch.distributed import destroy_process_group

    found = {**ddp(output, batch), **fsdp()}  # the Trainer has made the process group
    torch.save(found, output / f"rank{os.environ['RANK']}.pt")
    destroy_process_group()
