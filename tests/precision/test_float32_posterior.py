"""The r numbers, their draws and the KL are float32, whatever is done to the model that they stand in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from formats import FORMATS, Format, adapted, base_in, tokens
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from tiny_base import tiny_tokenizer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import scalabl
from scalabl.training.callback import ELBOCallback
from scalabl.tuner import stochastic_layers

FLOAT32 = FORMATS[0]


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".posterior." in name}


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.to("cpu", torch.float16),
        lambda model: model.double().to(torch.bfloat16),
    ],
    ids=["to", "half", "bfloat16", "device-and-dtype", "through-double"],
)
def test_moving_a_model_to_another_precision_leaves_them(
    move: Callable[[nn.Module], nn.Module], covariance: str
) -> None:
    model = adapted(base_in(FLOAT32), covariance=covariance)
    before, kl = numbers(model), scalabl.kl_divergence(model)
    move(model)
    after = numbers(model)
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name]), name
    assert torch.equal(scalabl.kl_divergence(model), kl)
    leaf = next(iter(stochastic_layers(model).values()))
    assert leaf.direction.dtype != torch.float32, "A is the model's, and went with it"
    leaf.train()
    drawn = leaf.draw(3, torch.device("cpu"))
    assert drawn.dtype == torch.float32
    out = model(input_ids=tokens(2)).logits
    assert out.isfinite().all() and out.dtype in (torch.float16, torch.bfloat16)


def test_a_step_too_small_for_bfloat16_is_kept_after_such_a_move() -> None:
    model = adapted(base_in(FLOAT32)).bfloat16()
    posterior = next(iter(stochastic_layers(model).values())).posterior
    with torch.no_grad():
        posterior.log_std.fill_(-3.0)
    optimizer = torch.optim.SGD([posterior.log_std], lr=1e-4)
    for _ in range(10):
        posterior.log_std.grad = torch.ones_like(posterior.log_std)
        optimizer.step()
    assert torch.allclose(posterior.log_std, torch.full_like(posterior.log_std, -3.001), atol=1e-6)


def test_meta_devices_and_gradients_move_as_everywhere() -> None:
    """What FSDP and lazy loading do: through the meta device, and with a gradient in place."""
    posterior = next(iter(stochastic_layers(adapted(base_in(FLOAT32))).values())).posterior
    posterior.log_mean.grad = torch.ones_like(posterior.log_mean)
    posterior.to(torch.bfloat16)
    assert posterior.log_mean.grad is not None and posterior.log_mean.grad.dtype == torch.float32
    posterior.to("meta")
    assert posterior.log_mean.is_meta
    posterior.to_empty(device="cpu")
    assert posterior.log_mean.device.type == "cpu" and posterior.log_mean.dtype == torch.float32


def test_preparing_for_kbit_training_and_loading_leave_them(form: Format, tmp_path: Path) -> None:
    base = prepare_model_for_kbit_training(base_in(form), use_gradient_checkpointing=False)
    for autocast in (True, False):
        torch.manual_seed(0)
        config = scalabl.ScalaBLConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
        assert all(value.dtype == torch.float32 for value in numbers(model).values())
        assert scalabl.kl_divergence(model).dtype == torch.float32
        base = model.unload()
    model = adapted(base_in(form))
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for name, value in saved.items() if ".posterior." in name)
    for autocast in (True, False):
        loaded = PeftModel.from_pretrained(base_in(form), str(tmp_path), autocast_adapter_dtype=autocast)
        for name, value in numbers(loaded).items():
            assert value.dtype == torch.float32 and torch.equal(value, numbers(model)[name]), name


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_automatic_mixed_precision_draws_the_very_same_numbers(covariance: str) -> None:
    model = adapted(base_in(FLOAT32), covariance=covariance)
    leaf = next(iter(stochastic_layers(model).values()))
    with scalabl.sample(model):
        torch.manual_seed(7)
        exact = leaf.draw(5, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(7)
            mixed = leaf.draw(5, torch.device("cpu"))
            covariances = leaf.posterior.covariance()
            kl = scalabl.kl_divergence(model)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, exact)
    assert torch.equal(covariances, leaf.posterior.covariance())
    assert kl.dtype == torch.float32 and torch.equal(kl, scalabl.kl_divergence(model))


def test_a_bfloat16_product_rounds_once_and_not_s() -> None:
    """diag(s) A x in bfloat16: exactly the float32 product with s, rounded; s itself keeps its digits."""
    leaf = next(iter(stochastic_layers(adapted(base_in(FLOAT32))).values()))
    x = torch.randn(2, 3, leaf.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        out = leaf(x)
        projected = nn.functional.linear(x, leaf.rows())
    assert out.dtype == projected.dtype == torch.bfloat16
    s = leaf.posterior.mean
    assert not torch.equal(s, s.bfloat16().float()), "digits that could be lost"
    assert torch.equal(out, (projected.float() * s).bfloat16())


class _Seen(TrainerCallback):
    """What the parameters, gradients and optimiser states of the r numbers are right after each step."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        for name, parameter in kwargs["model"].named_parameters():
            if ".posterior." in name:
                self.dtypes |= {parameter.dtype, parameter.grad.dtype}
                self.dtypes |= {v.dtype for k, v in optimizer.state[parameter].items() if k.startswith("exp_avg")}


@pytest.mark.parametrize("held", [FORMATS[0], FORMATS[1], FORMATS[4], FORMATS[6]], ids=lambda form: form.name)
def test_a_trainer_in_bfloat16_keeps_them_in_float32(held: Format, tmp_path: Path) -> None:
    model = adapted(base_in(held))
    before = numbers(model)
    ids = tokens(8)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-4, bf16=True, use_cpu=True,
        report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    seen = _Seen()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[ELBOCallback(8, learning_rate=1e-4), seen])  # type: ignore[arg-type]
    trainer.train()
    assert seen.dtypes == {torch.float32}
    for name, value in numbers(model).items():
        moved = (value - before[name]).abs()
        # Adam's first steps are of the size of the rate, below the spacing of bfloat16 near these numbers
        assert value.dtype == torch.float32 and (moved > 0).all() and (moved < 4e-4).all(), name
    assert all(entry["elbo/kl"] > 0 for entry in trainer.state.log_history if "elbo/kl" in entry)


@pytest.mark.parametrize("given", [True, False], ids=["given", "added"])
def test_trl_on_a_quantised_base_keeps_them_in_float32(given: bool, tmp_path: Path) -> None:
    """It casts what is trained to bfloat16, before a callback is called that was given, or after."""
    trl = pytest.importorskip("trl")
    model = adapted(base_in(FORMATS[3]))
    config = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-4, bf16=False, use_cpu=True,
        save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "red or blue? ", "completion": "red"}] * 4)
    seen, elbo = _Seen(), ELBOCallback(8, learning_rate=1e-4)
    trainer = trl.SFTTrainer(
        model,
        config,
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        callbacks=[elbo, seen] if given else [seen],
    )
    before = numbers(model)
    if not given:
        assert {value.dtype for value in before.values()} == {torch.bfloat16}, "TRL leaves them by itself now"
        trainer.add_callback(elbo)
    trainer.train()
    assert seen.dtypes == {torch.float32}
    for name, value in numbers(model).items():
        moved = (value - before[name].float()).abs()
        assert value.dtype == torch.float32 and (moved > 0).all() and (moved < 4e-4).all(), name
