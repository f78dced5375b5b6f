"""IVON (Shen et al. 2024, 2402.17641) on LoRA (Cong et al. 2024, 2411.04421): a Gaussian on every number of A and B,
learnt by an optimiser of its own, whose second-order estimate h is the precision.

    q(theta) = N(m, 1 / (ess (h + delta))),   minimise E_q[loss] + KL(q || N(0, 1 / (ess delta))) / ess
    h: from gradients at draws theta = m + noise, E[noise * gradient] (h + delta) ess       [Price's theorem]
    m <- m - lr clip((momentum + delta m) / (h + delta), +-10^-3)

Each batch of rows is seen at one draw of A and B; accumulated batches have one each, and what is clipped by
`max_grad_norm`, watched and logged is their average. The package ivon-opt is the authors'. What the settings mean here:

    ess = N / beta           N rows (trained tokens for rows of text). beta = 0.002 is what the authors' code has for
                             ARC-Easy: ess = 10^6 at 2,251 rows; their posteriors are cold throughout, 10^6 to 10^8
    init_sigma               the first standard deviation, which gives h its first value; 0.03 as theirs
                             (ess = 10^6, h = 10^-3)
    weight_decay = delta     0, as theirs: a flat prior
    learning_rate            the most that a number moves in a step, lr * 10^-3, as with AdamW: theirs is 3 * 10^-5 (lr
                             0.03) for 10,000 steps without warm-up, the default here 10^-3 for a few hundred

and theirs too are the decays of momentum (0.9) and h (0.99999). What else is trained, a classification head, is so by
IVON too, and predicts with its mean.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer

from scalabl.core import processes
from scalabl.core.errors import UserError
from scalabl.methods.plain import lora_options
from scalabl.predictive.base import MeanPredictive, Predictive
from scalabl.predictive.lora_particles import WeightNoisePredictive, empty_noise, lora_matrices
from scalabl.runs.method import Run, TrainedMethod
from scalabl.runs.settings import DEFAULTS, Settings
from scalabl.training.parameter_group import innermost

try:
    import ivon
except ImportError:  # a finished run predicts without it
    ivon = None

CLIP_RADIUS = 1e-3


class IVONLoRA(TrainedMethod):
    """A plain LoRA with a standard deviation for every weight, beside it in DIR/ivon.safetensors."""

    optimizer_numbers = 6  # momentum, h, and while a step runs the mean, its noise, and two averages over the batches

    def adapter_config(self, settings: Settings, model: PreTrainedModel) -> PeftConfig:
        if ivon is None:
            raise UserError("ivon needs the package ivon-opt; pip install 'scalabl[ivon]'.")
        named = settings.optimisation.optimizer
        if named != DEFAULTS["optimizer"]:
            raise UserError(f"ivon has an optimiser of its own, but optimizer is {named}; leave it out.")
        if settings.posterior.beta == 0:
            raise UserError("ivon's posterior has 1 / beta as its certainty, but beta is 0; mle is what you may mean.")
        if processes.world_size() > 1:
            raise UserError("ivon is trained in one process; leave out accelerate launch.")
        return LoraConfig(**lora_options(settings, model))

    def optimizer(self, settings: Settings, model: PeftModel, num_examples: int) -> Optimizer:
        ess, decay = num_examples / settings.posterior.beta, settings.optimisation.weight_decay
        sigma = settings.posterior.init_sigma
        if ess * decay * sigma**2 >= 1:
            raise UserError(
                f"weight_decay {decay:g} allows no standard deviation of {sigma:g}, init_sigma; lower one of them."
            )
        weights = [matrix.weight for matrix in lora_matrices(model).values()]
        known = set(map(id, weights))
        made: Optimizer = ivon.IVON(
            [*weights, *(p for p in model.parameters() if p.requires_grad and id(p) not in known)],
            lr=settings.optimisation.learning_rate / CLIP_RADIUS,
            ess=ess,
            hess_init=1 / (ess * sigma**2) - decay,
            beta1=0.9,
            beta2=0.99999,
            weight_decay=decay,
            clip_radius=CLIP_RADIUS,
            rescale_lr=False,
        )
        return made

    def trainer_class(self, base: type[Trainer]) -> type[Trainer]:
        return type(f"IVON{base.__name__}", (_AtDraws, base), {})

    def beside(self, trainer: Trainer) -> dict[str, Tensor]:
        """1 / sqrt(ess (h + delta)) by the matrix's name."""
        (group,) = innermost(trainer.optimizer).param_groups  # type: ignore[arg-type]
        std = (group["ess"] * (group["hess"] + group["weight_decay"])).rsqrt().cpu()
        parts = std.split([weight.numel() for weight in group["params"]])
        names = lora_matrices(trainer.model)  # type: ignore[arg-type]
        return {
            name: part.view(weight.shape).clone()
            for name, part, weight in zip(names, parts, group["params"], strict=False)  # the matrices come first
        }

    def predictive(self, run: Run, *, samples: int = 10, seed: int = 0) -> Predictive:
        """The average over N draws of A and B; N = 0 is the mean, a plain LoRA."""
        return WeightNoisePredictive.of_std(self.std(run), samples=samples, seed=seed) if samples else MeanPredictive()

    def std(self, run: Run) -> dict[str, Tensor]:
        """The standard deviation of every A and B by its name, as training left it.

        Raises:
            UserError: the file is missing, altered, or another adapter's.
        """
        if run.directory is None:
            raise UserError("ivon's posterior is kept beside a run's adapter; load the run with load_run(DIR).")
        path = run.directory / "ivon.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                found, of = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or altered; restore it, or use --predictive mean.") from error
        if (of or {}).get("adapter_sha256") != run.record.adapter_sha256:
            raise UserError(f"{path} belongs to another adapter than the one in {run.directory}; restore its files.")
        return found

    def count(self, model: PeftModel) -> tuple[int, int]:
        lora, _ = super().count(model)
        return lora, lora

    def empty_particles(self, model: PeftModel, samples: int) -> AbstractContextManager[None]:
        return empty_noise(model, samples, list(lora_matrices(model)))


class _AtDraws:
    """Beside a Trainer: each batch of rows has its gradient at a draw of the weights."""

    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        trainer: Any = self
        optimizer: Any = innermost(trainer.optimizer)
        (group,) = optimizer.param_groups
        weights: list[Tensor] = group["params"]
        optimizer.current_step = trainer.state.global_step  # no checkpoint has it, and one is loaded onto the CPU
        group |= {name: group[name].to(weights[0].device) for name in ("hess", "momentum")}
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        with optimizer.sampled_params(train=True):
            loss: Tensor = super().training_step(model, inputs, *args)  # type: ignore[misc]
            for weight in weights:  # the trainer divides by the number of batches that IVON averages over
                weight.grad.mul_(trainer.current_gradient_accumulation_steps)  # type: ignore[union-attr]
        parts = optimizer.state["avg_grad"].split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.grad = part.view_as(weight)
        return loss
