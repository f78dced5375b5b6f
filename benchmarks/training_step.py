"""One optimiser step of each method on one batch: what `training_cost.py` times and weighs, in a process of its own.

    python benchmarks/training_step.py --measure time --rounds 40 --model smollm2-135m-instruct --to out.json

The methods share the frozen base's tensors, the batch and the rest of the step (loss, backward pass, clipping of
gradients, AdamW); they differ in their adapters and in what each adds to a step as its documentation has it.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import cpu_name, interleaved
from methods import METHODS, RANK, TARGETS
from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
from shapes import SHAPES
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import scalabl
from scalabl.methods.blob import KLStepCallback, cycle_steps
from scalabl.runs.models import DTYPES, load_base
from scalabl.tuner.blob import BLoBConfig

Step = Callable[[], None]
ROWS = 1000  # N of the evidence lower bound; it scales the KL's gradient and costs nothing


def load(model: str, shape: str | None, device: str, dtype: str, seed: int) -> PreTrainedModel:
    """The base model: by name, or with random weights in a published shape."""
    torch.manual_seed(seed)
    if shape is None:
        return load_base(model, dtype=dtype, device=device)[0]
    with torch.device(device):
        return AutoModelForCausalLM.from_config(SHAPES[shape].config(), dtype=DTYPES[dtype])


def adapt(base: PreTrainedModel, method: str, targets: Sequence[str] = TARGETS) -> PeftModel:
    """The base with the adapter of a method, the base's tensors being shared between all that are made."""
    own = copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    shared: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": list(targets)}
    if method == "blob":
        return get_peft_model(own, BLoBConfig(**shared))
    if method.startswith("scalabl"):
        shared["covariance"] = "full" if method == "scalabl-full" else "diagonal"
        return get_peft_model(own, scalabl.ScalaBLConfig(**shared))
    if method == "monteclora":
        shared["monteclora_config"] = MontecloraConfig()
    if method == "monteclora-unbuffered":
        shared["monteclora_config"] = MontecloraConfig(buffer_size=1)
    return get_peft_model(own, LoraConfig(**shared))


def make_step(base: PreTrainedModel, method: str, batch: Tensor, directory: Path) -> Step:
    """A function that does one optimiser step of a method."""
    return step_of(adapt(base, method), method, batch, directory)


def step_of(model: Any, method: str, batch: Tensor, directory: Path) -> Step:
    """The same for an adapted model."""
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=10**6, report_to=[], use_cpu=batch.device.type == "cpu"
    )
    state, control = TrainerState(max_steps=arguments.max_steps), TrainerControl()
    callback: TrainerCallback = TrainerCallback()  # does nothing
    if method.startswith("scalabl"):
        callback = scalabl.ELBOCallback(num_examples=ROWS)
    if method == "blob":
        callback = KLStepCallback(cycle_steps(ROWS, len(batch)), learning_rate=0.01)
    callback.on_train_begin(arguments, state, control, model=model, optimizer=optimizer, train_dataloader=None)

    def step() -> None:
        loss = model(input_ids=batch, labels=batch).loss
        if method.startswith("monteclora"):
            loss = loss + model.base_model._get_monteclora_loss()  # as PEFT's MontecloraTrainerMixin does
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        callback.on_pre_optimizer_step(arguments, state, control, optimizer=optimizer)
        optimizer.step()
        callback.on_optimizer_step(arguments, state, control, optimizer=optimizer)
        optimizer.zero_grad()

    return step


def times(base: PreTrainedModel, methods: list[str], batch: Tensor, rounds: int, warmup: int, seed: int) -> Any:
    """Method -> [(wall seconds, CPU seconds)] of a step a round; the first rounds (`warmup`) are left out."""
    with tempfile.TemporaryDirectory() as directory:
        steps = {name: make_step(base, name, batch, Path(directory)) for name in methods}

        def measure(name: str) -> tuple[float, float]:
            synchronise(batch.device)
            wall, processor = time.perf_counter(), time.process_time()
            steps[name]()
            synchronise(batch.device)
            return time.perf_counter() - wall, time.process_time() - processor

        measured = interleaved(methods, warmup + rounds, seed, measure)
    return {name: pairs[warmup:] for name, pairs in measured.items()}


def memory(base: PreTrainedModel, method: str, batch: Tensor, steps: int) -> dict[str, int]:
    """Peak bytes of this process (on a GPU: of its tensors), and what the peak was before the first step."""
    with tempfile.TemporaryDirectory() as directory:
        step = make_step(base, method, batch, Path(directory))
        before = peak_bytes(batch.device)
        for _ in range(steps):
            step()
    return {"peak": peak_bytes(batch.device), "before_training": before}


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synchronise(device: torch.device) -> None:
    """Wait for a GPU to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure one thing, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=["time", "memory"], required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=40, help="optimiser steps of each method that count")
    parser.add_argument("--warmup", type=int, default=3, help="optimiser steps of each method before them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    base = load(a.model, a.shape, a.device, a.dtype, a.seed)
    generator = torch.Generator().manual_seed(a.seed)
    batch = torch.randint(base.config.vocab_size, (a.batch, a.length), generator=generator).to(a.device)
    if a.measure == "time":
        result = {"steps": times(base, a.methods, batch, a.rounds, a.warmup, a.seed)}
    else:
        result = memory(base, a.methods[0], batch, a.rounds)
    device = torch.cuda.get_device_name(batch.device) if batch.device.type == "cuda" else cpu_name()
    a.to.write_text(json.dumps(result | {"device": device}), encoding="utf-8")


if __name__ == "__main__":
    main()
