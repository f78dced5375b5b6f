"""A tiny Llama with a ScalaBL adapter, rows of tokens, and a Trainer around them: what the tests here share."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    DataCollatorForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import scalabl
from scalabl.tuner import stochastic_layers


def tiny_model(seed: int = 0, **config: Any) -> PeftModel:
    """Two layers, q_proj and v_proj adapted, B away from zero so that every parameter has a likelihood gradient."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
    model = get_peft_model(base, scalabl.ScalaBLConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def rows(number: int = 16, seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows of 5 to 9 tokens, every token trained."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 10, (number,), generator=generator).tolist()
    tokens = [torch.randint(1, 32, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in tokens]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w1 .. w31, and <pad>."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0} | {f"w{i}": i for i in range(1, 32)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w31"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="w30", unk_token="w31")


def arguments(directory: Path | str, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**{**settings, **options})


def trainer(
    model: PeftModel,
    args: TrainingArguments,
    callbacks: list[TrainerCallback],
    data: list[Any] | None = None,
    **options: Any,
) -> Trainer:
    return Trainer(
        model,
        args,
        train_dataset=rows() if data is None else data,
        data_collator=DataCollatorForTokenClassification(tiny_tokenizer()),
        callbacks=callbacks,
        **options,
    )


def weights(model: PeftModel) -> dict[str, Tensor]:
    """A copy of all trainable parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def posterior_ids(model: PeftModel) -> set[int]:
    return {id(p) for leaf in stochastic_layers(model).values() for p in leaf.posterior.parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


class Recorder(TrainerCallback):
    """Parameters and gradients right before each optimiser step, parameters and groups right after it."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.groups: list[list[list[int]]] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.before.append(weights(model))
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(weights(kwargs["model"]))
        self.groups.append([[id(p) for p in group["params"]] for group in kwargs["optimizer"].param_groups])
