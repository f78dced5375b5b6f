"""Training step and peak memory of ScalaBL and of PEFT's MonteCLoRA, as ratios to plain PEFT LoRA.

    python benchmarks/training_cost.py
    python benchmarks/training_cost.py --shape qwen2.5-7b --device cuda --dtype bfloat16 --length 300

Time: one process steps all methods, one step each a round, in an order drawn anew for each round; a ratio is of the
two steps of one round. Memory: every run is a process of its own (this script with `--measure`). The methods share the
frozen base's tensors, the batch and the rest of the step (loss, backward pass, clipping of gradients, AdamW); they
differ in their adapters and in what each adds to a step as its documentation has it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from extra_parameters import SHAPES
from peft import LoraConfig, MontecloraConfig, PeftModel, get_peft_model
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
from scalabl.core.files import write_text
from scalabl.methods.blob import KLStepCallback, cycle_steps
from scalabl.runs.models import DTYPES, load_base
from scalabl.tuner.blob import BLoBConfig

RANK = 8
TARGETS = ("q_proj", "v_proj")
# by name; the first is what the others are divided by
METHODS = {
    "lora": "plain LoRA (PEFT)",
    "scalabl": "ScalaBL, diagonal",
    "scalabl-full": "ScalaBL, full covariance",
    "monteclora": "MonteCLoRA (PEFT), its defaults",
    "monteclora-unbuffered": "MonteCLoRA (PEFT), buffer_size = 1",
}
BASELINE = "lora"
ROWS = 1000  # N of the evidence lower bound; it scales the KL's gradient and costs nothing
# glibc keeps freed memory for later by a threshold that moves with the history of a process, which alone moves the
# peak by some per cent; with a fixed one every large tensor is given back at once, and the peak is what lives
ALLOCATORS = {
    "peak_memory": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    "peak_memory_default_allocator": {},
}
Step = Callable[[], None]


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


def step_of(model: Any, method: str, batch: Tensor, directory: Path) -> Step:
    """A function that does one optimiser step of an adapted model, as its method has it."""
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
        steps = {name: step_of(adapt(base, name), name, batch, Path(directory)) for name in methods}

        def measure(name: str) -> tuple[float, float]:
            synchronise(batch.device)
            wall, processor = time.perf_counter(), time.process_time()
            steps[name]()
            synchronise(batch.device)
            return time.perf_counter() - wall, time.process_time() - processor

        measured = harness.interleaved(methods, warmup + rounds, seed, measure)
    return {name: pairs[warmup:] for name, pairs in measured.items()}


def memory(base: PreTrainedModel, method: str, batch: Tensor, steps: int) -> dict[str, int]:
    """Peak bytes of this process (on a GPU: of its tensors), and what the peak was before the first step."""
    with tempfile.TemporaryDirectory() as directory:
        step = step_of(adapt(base, method), method, batch, Path(directory))
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


def measure(a: argparse.Namespace) -> None:
    """In a process of its own: measure one thing, and write it to the file `to`."""
    torch.set_num_threads(a.threads)
    base = load(a.model, a.shape, a.device, a.dtype, a.seed)
    generator = torch.Generator().manual_seed(a.seed)
    batch = torch.randint(base.config.vocab_size, (a.batch, a.length), generator=generator).to(a.device)
    if a.measure == "time":
        result = {"steps": times(base, a.methods, batch, a.rounds, a.warmup, a.seed)}
    else:
        result = memory(base, a.methods[0], batch, a.memory_steps)
    device = torch.cuda.get_device_name(batch.device) if batch.device.type == "cuda" else harness.cpu_name()
    write_text(a.to, json.dumps(result | {"device": device}))


def child(a: argparse.Namespace, what: str, methods: Sequence[str], allocator: dict[str, str]) -> dict[str, Any]:
    """What a process of its own measures ("time" or "memory"), with the environment of an allocator."""
    threads = {"OMP_NUM_THREADS": str(a.threads), "MKL_NUM_THREADS": str(a.threads)}
    with tempfile.TemporaryDirectory() as directory:
        to = Path(directory) / "measured.json"
        line = [sys.executable, __file__, "--measure", what, "--to", str(to), "--methods", *methods]
        names = ("model", "shape", "device", "dtype", "batch", "length", "rounds", "warmup", "memory_steps", "seed")
        for name in (*names, "threads"):
            if getattr(a, name) is not None:
                line += [f"--{name.replace('_', '-')}", str(getattr(a, name))]
        environment = os.environ | threads | allocator
        made = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if made.returncode:
            raise SystemExit(f"{made.stderr}\n{' '.join(line)} failed")
        measured: dict[str, Any] = json.loads(to.read_text(encoding="utf-8"))
    return measured


def to_baseline(values: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Method -> the ratios to the baseline of the same round, with their median and its interval."""
    return {name: harness.ratios(own, values[BASELINE], 5) for name, own in values.items()}


def weigh(a: argparse.Namespace, methods: list[str], allocator: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Method -> the ratios of its peak memory to the baseline's, and the peaks in MiB, each of a process of its own."""
    runs = harness.interleaved(methods, a.memory_repeats, a.seed, lambda name: child(a, "memory", [name], allocator))
    peaks = to_baseline({name: [run["peak"] for run in own] for name, own in runs.items()})
    for name, own in runs.items():
        for key in ("peak", "before_training"):
            peaks[name][f"{key}_mib"] = [round(run[key] / 2**20, 1) for run in own]
    return peaks


def main() -> None:
    """Measure, and write training_cost.json and .md."""
    parser = harness.options(
        __doc__,
        model=("smollm2-135m-instruct", "the base, by name or directory"),
        shape=(None, "random weights in a published shape instead", SHAPES),
        methods=(list(METHODS), None, METHODS),
        device="cpu",
        dtype=("float32", None, DTYPES),
        batch=(4, "rows of the batch"),
        length=(96, "tokens of a row"),
        rounds=(40, "rounds of timed steps"),
        warmup=(3, "rounds before them"),
        memory_repeats=(3, "processes of each method"),
        memory_steps=(3, "optimiser steps of each of them"),
        seed=0,
        threads=1,
        output=(harness.RESULTS, "directory of the results"),
        name=("training_cost", "of the two files"),
        measure=(None, "measure one thing, in this process", ("time", "memory")),
        to=(Path(), "where what it measures goes"),
    )
    a = parser.parse_args()
    if a.measure:
        return measure(a)
    load = [harness.load_average()]
    methods = [name for name in METHODS if name in (BASELINE, *a.methods)]
    timed = child(a, "time", methods, {})
    load.append(harness.load_average())
    weighed = {key: weigh(a, methods, allocator) for key, allocator in ALLOCATORS.items()}
    wall, processor = (to_baseline({n: [step[i] for step in own] for n, own in timed["steps"].items()}) for i in (0, 1))
    known = harness.facts(
        model=f"{a.shape} (random weights)" if a.shape else a.model,
        data=f"{a.batch} rows of {a.length} random tokens, the same in every step",
        seeds=str(a.seed),
        adapters=f"{', '.join(TARGETS)} of every layer, r = {RANK}; {a.dtype}, AdamW, gradients clipped",
        rounds=f"{a.rounds} after {a.warmup} of warm-up, in random order within a round; for memory {a.memory_repeats} "
        "processes a method",
        load=f"{load[0]} before the timed steps, {load[1]} after",
        device=f"{timed['device']}, {a.threads} thread{'s' if a.threads != 1 else ''}",
    )
    results = {
        name: {
            "title": METHODS[name],
            "step_wall": wall[name],
            "step_processor": processor[name],
            **{key: of_method[name] for key, of_method in weighed.items()},
        }
        for name in methods
    }
    content = {"facts": known, "baseline": BASELINE, "methods": results}
    harness.write_results(a.output, a.name, content, markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    rows = []
    for result in content["methods"].values():
        cells = [_cell(result[key]) for key in ("step_wall", "step_processor", *ALLOCATORS)]
        mib = f"{statistics.median(result['peak_memory']['peak_mib']):,.0f} MiB"
        rows.append([result["title"], *cells, mib])
    header = ["method", "step, wall clock", "step, processor time", "peak memory", "with the default allocator", "peak"]
    return f"""# Training cost, relative to plain LoRA

{harness.markdown_table(header, rows)}

Step: median over rounds of the ratio of two steps of the same round, with its 95 % bootstrap interval. Memory: the
peak of the whole process (base, adapters, optimiser and activations; on a GPU of its tensors), median ratio with the
smallest and largest. "Peak memory" is measured with large tensors given back to the system as soon as they are freed
(`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` at 65536), so that it is the memory in use; glibc's default
keeps some of it, how much differs from run to run. MonteCLoRA draws the noise of `buffer_size` (150) steps ahead for
every layer: that is its peak, and the steps that fill the buffer again are outliers which a median leaves out.

{harness.markdown_facts(content["facts"])}
"""


def _cell(ratio: dict[str, Any]) -> str:
    if set(ratio["ratios"]) == {1.0}:
        return "1"
    few = ratio["n"] < 10
    low, high = (min(ratio["ratios"]), max(ratio["ratios"])) if few else (ratio["low"], ratio["high"])
    return f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
