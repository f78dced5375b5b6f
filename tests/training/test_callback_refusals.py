"""What ELBOCallback refuses, and that it says which and what to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_run import arguments, rows, tiny_model, trainer
from torch.utils.data import IterableDataset
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from scalabl.core.errors import UserError
from scalabl.training.callback import ELBOCallback
from scalabl.training.refusals import refuse_hidden_gradients
from scalabl.tuner import ScalaBLConfig


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": -3}, "num_examples"),
        ({"num_examples": 2.5}, "num_examples"),
        ({"beta": -0.1}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"schedule": "cosine"}, "elbo, warmup, minibatch"),
        ({"warmup_fraction": 1.5}, "warmup_fraction"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"cycle": 0}, "cycle"),
        ({"kl": "both"}, "kl is 'both'; it must be reverse, .* or forward"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        ELBOCallback(**{"num_examples": 8, **options})


def test_a_model_without_a_posterior(tmp_path: Path) -> None:
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="No stochastic layer"):
        trainer(model, arguments(tmp_path), [ELBOCallback(8)]).train()


def test_an_adapter_that_is_merged_or_disabled(tmp_path: Path) -> None:
    """The likelihood would not reach it, and the KL alone would bring it to the prior."""
    model = tiny_model()
    run = trainer(model, arguments(tmp_path), [ELBOCallback(8)])
    model.merge_adapter()
    with pytest.raises(UserError, match=r"merged into its base.* or trained; call unmerge_adapter\(\) first"):
        run.train()
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()
    with pytest.raises(UserError, match="disabled, so that nothing can be drawn or trained"):
        run.train()


def test_a_frozen_posterior_and_one_the_optimiser_does_not_know(tmp_path: Path) -> None:
    frozen = tiny_model()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    with pytest.raises(UserError, match="frozen"):
        trainer(frozen, arguments(tmp_path), [ELBOCallback(8)]).train()

    model = tiny_model()
    known = [p for name, p in model.named_parameters() if "lora_B" in name]
    run = trainer(model, arguments(tmp_path), [ELBOCallback(8)])
    run.optimizer = torch.optim.SGD(known, lr=0.1)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj is not among"):
        run.train()


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_sequences_laid_end_to_end(tmp_path: Path, option: str) -> None:
    args = arguments(tmp_path)
    setattr(args, option, True)
    with pytest.raises(UserError, match=f"{option}=False"):
        trainer(tiny_model(), args, [ELBOCallback(8)]).train()


def test_a_flattening_collator(tmp_path: Path) -> None:
    run = Trainer(
        tiny_model(),
        arguments(tmp_path),
        train_dataset=rows(),  # type: ignore[arg-type]
        data_collator=DataCollatorWithFlattening(),
        callbacks=[ELBOCallback(8)],
    )
    with pytest.raises(UserError, match="DataCollatorWithFlattening"):
        run.train()


def test_engines_that_hide_gradients(tmp_path: Path) -> None:
    model = tiny_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    args = arguments(tmp_path)
    refuse_hidden_gradients(args, model, sgd)  # this one does not
    with pytest.raises(UserError, match="DeepSpeed"):
        refuse_hidden_gradients(SimpleNamespace(deepspeed="zero3.json", optim="sgd"), model, sgd)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="during the backward pass"):
        refuse_hidden_gradients(args, model, LayerWiseDummyOptimizer(optimizer_dict={}))
    layerwise = arguments(tmp_path, optim="galore_adamw_layerwise", optim_target_modules=["q_proj"])
    with pytest.raises(UserError, match="galore_adamw_layerwise"):
        refuse_hidden_gradients(layerwise, model, sgd)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        while True:
            yield from rows()


def test_minibatch_needs_a_cycle_where_the_data_has_no_length(tmp_path: Path) -> None:
    data: Any = Stream()
    with pytest.raises(UserError, match="no length"):
        trainer(tiny_model(), arguments(tmp_path), [ELBOCallback(8, schedule="minibatch")], data).train()
    run = trainer(tiny_model(), arguments(tmp_path), [ELBOCallback(8, schedule="minibatch", cycle=2)], data)
    assert run.train().global_step == 4


def test_active_adapters_with_different_priors(tmp_path: Path) -> None:
    model = tiny_model()
    model.add_adapter("narrow", ScalaBLConfig(r=2, target_modules=["q_proj"], prior_std=0.1))
    model.base_model.set_adapter(["default", "narrow"])
    with pytest.raises(UserError, match="different priors"):
        trainer(model, arguments(tmp_path), [ELBOCallback(8)]).train()


@pytest.mark.parametrize("config", [{"covariance": "full"}, {"empirical_prior": True}])
def test_the_forward_kl_of_what_it_is_not_for(tmp_path: Path, config: dict[str, Any]) -> None:
    run = trainer(tiny_model(**config), arguments(tmp_path), [ELBOCallback(8, kl="forward")])
    with pytest.raises(UserError, match='for a diagonal covariance and a fixed prior.*use kl="reverse"'):
        run.train()
    assert trainer(tiny_model(**config), arguments(tmp_path), [ELBOCallback(8)]).train().global_step == 4
