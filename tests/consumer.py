"""A user's file, checked by `mypy --strict` (make lint): the public names have types, those of the docs."""

from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import scalabl
from scalabl import Classifier, ELBOCallback, ScalaBLConfig


def adapted(base: PreTrainedModel) -> PeftModel:
    return get_peft_model(base, ScalaBLConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))


def callback(rows: int) -> ELBOCallback:
    return ELBOCallback(num_examples=rows)


def labels(texts: Sequence[str]) -> list[str | None]:
    answer = Classifier.from_pretrained("run")(texts)
    rows: int = answer.probs.shape[0]
    assert rows == len(answer.entropy) == len(answer.aleatoric) == len(answer.epistemic)
    return list(answer.label)


def averaged(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    with scalabl.particles(model, 10, seed=0):
        logits: torch.Tensor = model(input_ids=ids.repeat(10, 1)).logits
    with scalabl.mean(model):
        kl: torch.Tensor = scalabl.kl_divergence(model)
    return logits + kl


def written(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    return [answer.text for answer in scalabl.generate(model, tokenizer, prompts)]


def refused(directory: str) -> str:
    try:
        Classifier.from_pretrained(directory)
    except scalabl.UserError as error:
        return str(error)
    return scalabl.__version__
