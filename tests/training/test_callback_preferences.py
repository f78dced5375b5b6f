"""ELBOCallback in TRL's trainers of preferences: the reference is the mean, and ratios of draws are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny_run import tiny_model, tiny_tokenizer

import scalabl
from scalabl.core.errors import UserError
from scalabl.training.callback import ELBOCallback
from scalabl.training.refusals import refuse_ratios_of_draws
from scalabl.tuner import stochastic_layers

trl = pytest.importorskip("trl")
GMPOConfig = pytest.importorskip("trl.experimental.gmpo").GMPOConfig
OnlineDPOConfig = pytest.importorskip("trl.experimental.online_dpo").OnlineDPOConfig
use_adapter = pytest.importorskip("trl.trainer.utils").use_adapter

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def drawing_model(**config: Any) -> PeftModel:
    """A model whose draws move the logits by much more than rounding does."""
    model = tiny_model(init_sigma=0.5, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(10)
    return model


def preferences(kind: str) -> Dataset:
    rows = range(1, 9)
    if kind == "dpo":
        return Dataset.from_list(
            [{"prompt": f"w{i} ", "chosen": f"w{i + 1}", "rejected": f"w{i + 2} w3"} for i in rows]
        )
    return Dataset.from_list([{"prompt": f"w{i} ", "completion": f"w{i + 1}", "label": i % 2 == 0} for i in rows])


def trainer_of(kind: str, directory: Path, model: PeftModel, **options: Any) -> Any:
    trainer, config = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "kto": (trl.KTOTrainer, trl.KTOConfig)}[kind]
    return trainer(
        model,
        args=config(output_dir=str(directory), **OPTIONS, **options),
        train_dataset=preferences(kind),
        processing_class=tiny_tokenizer(),
        callbacks=[ELBOCallback(8)],
    )


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_the_reference_is_the_mean_of_what_training_began_with(kind: str, tmp_path: Path) -> None:
    model = drawing_model()
    with scalabl.mean(model), torch.no_grad():
        expected = model(input_ids=IDS).logits
    trainer = trainer_of(kind, tmp_path, model)
    assert "ref" in model.peft_config
    seen: list[torch.Tensor] = []

    class Reads(ELBOCallback):
        """In training, as the trainers' losses read it."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            assert model.training
            for _ in range(2):
                with torch.no_grad(), use_adapter(model, "ref"):
                    seen.append(model(input_ids=IDS).logits)
            with torch.no_grad():
                assert not torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)

    trainer.remove_callback(ELBOCallback)
    trainer.add_callback(Reads(8))
    trainer.train()
    assert len(seen) == 4
    for found in seen:
        torch.testing.assert_close(found, expected)
    assert {leaf.state for leaf in stochastic_layers(model, "ref").values()} == {"auto"}
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["elbo/kl"] > 0
    if kind == "kto":  # its own
        assert "kl" in entry and entry["kl"] != entry["elbo/kl"]


def test_the_log_probabilities_of_a_reference_repeat(tmp_path: Path) -> None:
    trainer = trainer_of("dpo", tmp_path, drawing_model(), learning_rate=0.0)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, ELBOCallback))
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer()
    handed = {"model": trainer.model, "optimizer": trainer.optimizer, "train_dataloader": None}
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, **handed)
    trainer.model.train()
    passes = [trainer.compute_ref_log_probs(trainer.model, batch) for _ in range(3)]
    callback.on_train_end()
    trainer.model.eval()
    mean = trainer.compute_ref_log_probs(trainer.model, batch)
    for chosen, rejected in passes:
        torch.testing.assert_close((chosen, rejected), mean)


def test_a_reference_read_before_training_is_refused_of_a_model_that_draws(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"precompute_ref_log_probs=True reads .* call model.eval\(\)"):
        trainer_of("dpo", tmp_path, drawing_model().train(), precompute_ref_log_probs=True)


def test_grpo_is_refused(tmp_path: Path) -> None:
    trainer = trl.GRPOTrainer(
        tiny_model(),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=trl.GRPOConfig(output_dir=str(tmp_path), num_generations=2, max_completion_length=4, **OPTIONS),
        train_dataset=Dataset.from_list([{"prompt": f"w{i}"} for i in range(1, 9)]),
        processing_class=tiny_tokenizer(),
        callbacks=[ELBOCallback(8)],
    )
    with pytest.raises(UserError, match="GRPO holds the probability of a generated text against another pass"):
        trainer.train()


@pytest.mark.parametrize(
    ("config", "options", "name"),
    [
        (trl.RLOOConfig, {"num_generations": 2}, "RLOO"),
        (GMPOConfig, {"num_generations": 2}, "GRPO"),
        (OnlineDPOConfig, {}, "OnlineDPO"),
    ],
)
def test_its_kin_are_refused(config: Any, options: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} holds the probability"):
        refuse_ratios_of_draws(config(output_dir=str(tmp_path), **OPTIONS, **options))
