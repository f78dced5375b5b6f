"""Trainings and predictions of the real model, weighed: what `plan.py` holds a plan against.

    python benchmarks/plan_step.py --cases cases.json --to measured.json

Each case has a process of its own, forked from this one when nothing but libraries is in its memory.
Training is the library's own run (the Hugging Face Trainer with its callbacks) for two steps, prediction its own
predictive; only the rows are made up, all of one length. On a CPU the growth of the process is measured, on a GPU that
of its tensors.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _common import cpu_name
from peft import PeftModel, get_peft_model

from scalabl.planning.rows import PlannedRows
from scalabl.predictive import MeanPredictive, MonteCarloPredictive, predict
from scalabl.runs.method import load_method
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Continuation, Encoded, Letters, Scorer, Scoring
from scalabl.scoring.trunk import Trunk
from scalabl.training.run import optimise

STEPS = 2  # the second one has the optimiser's states
_SHORT = 4  # tokens


def encoded_rows(rows: PlannedRows, number: int, vocabulary: int, seed: int = 0) -> list[Encoded]:
    """So many rows of random tokens."""
    like = rows.of(1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (number, like.input_ids.shape[1]), generator=generator).tolist()
    positions, segments = like.position_ids[0].tolist(), like.segments[0].tolist()
    return [Encoded(own, positions, segments, int(like.num_choices[0]), 0) for own in ids]


class Scales:
    """The memory that this process holds, and the most since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return self._status("VmRSS")

    def peak(self) -> int:
        """The most bytes since `reset`."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return self._status("VmHWM")

    def reset(self) -> None:
        """Give back what is free, and begin anew."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak is now

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def adapted(recipe: Settings, device: str) -> tuple[PeftModel, Any]:
    """The model with its adapter, every weight of it in memory, and its tokenizer."""
    base, tokenizer = load_base(recipe.model, dtype=recipe.machine.dtype, bits=recipe.machine.bits, device=device)
    model: Any = get_peft_model(base, load_method(recipe.method).adapter_config(recipe, base))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # mapped files come into memory at their first use
    base.tie_weights()
    return model, tokenizer


def train(model: PeftModel, recipe: Settings, rows: PlannedRows, scoring: Scoring) -> None:
    """Two steps."""
    encoded = encoded_rows(rows, STEPS * rows.batch, model.config.vocab_size)
    if rows.loss == "tokens":
        return train_on_tokens(model, recipe, torch.tensor([row.input_ids for row in encoded]), rows.batch)
    trunk = None if recipe.optimisation.gradient_checkpointing else Trunk(model)
    if trunk is not None and trunk.depth:
        shape = (rows.length, model.config.get_text_config().hidden_size)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        # the run keeps what the frozen layers give for all rows
        for i, row in enumerate(encoded):
            encoded[i] = Encoded(**{**vars(row), "trunk": torch.randn(shape, dtype=dtype)})
    with tempfile.TemporaryDirectory() as directory:
        optimise(recipe, Path(directory), model, scoring, trunk, encoded)


def train_on_tokens(model: Any, recipe: Settings, ids: torch.Tensor, batch: int) -> None:
    """Plain supervised fine-tuning: the loss of every token."""
    if recipe.optimisation.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    for chunk in ids.to(model.device).split(batch):
        model(input_ids=chunk, labels=chunk, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def answer(model: PeftModel, rows: PlannedRows, scoring: Scoring, samples: int) -> None:
    """One batch."""
    predictive = MonteCarloPredictive(samples, chunk=samples) if samples else MeanPredictive()
    encoded = encoded_rows(rows, rows.batch, model.config.vocab_size)
    predict(Scorer(model, scoring, Trunk(model)), encoded, predictive, batch_size=rows.batch)


def measure(case: dict[str, Any], device: str) -> dict[str, Any]:
    """Bytes of the model with its adapter, and of the work on top of them."""
    recipe, rows = Settings.flat(**case["recipe"]), PlannedRows(**case["rows"])
    scales = Scales(torch.device(device))
    scales.reset()
    empty = scales.now()
    model, tokenizer = adapted(recipe, device)
    letters = Letters(tokenizer, num_letters=rows.choices)
    scoring = letters if rows.loss == "letters" else Continuation(tokenizer, normalization="token")

    def work(recipe: Settings, rows: PlannedRows) -> None:
        if case["what"] == "training":
            train(model, recipe, rows, scoring)
        else:
            answer(model, rows, scoring, case["samples"])
        model.zero_grad(set_to_none=True)

    # one short row first: what libraries load and set up at their first use is not the work's
    work(recipe.changed(batch_size=1), replace(rows, batch=1, length=_SHORT))
    scales.reset()
    loaded = scales.now()
    work(recipe, rows)
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {"model": loaded - empty, "work": scales.peak() - loaded, "device": name}


def in_a_fork(case: dict[str, Any], device: str) -> dict[str, Any]:
    """`measure` in a process of its own.

    Raises:
        SystemExit: it failed; its traceback is on standard error.
    """
    forked = multiprocessing.get_context("fork")
    receiver, sender = forked.Pipe(duplex=False)
    process = forked.Process(target=lambda: sender.send(measure(case, device)))
    process.start()
    sender.close()
    try:
        measured: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{case} failed") from None
    process.join()
    return measured


def main() -> None:
    """Measure all cases, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=Path, required=True, help="a JSON list of cases")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--to", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    measured = []
    for case in json.loads(a.cases.read_text(encoding="utf-8")):
        measured.append(in_a_fork(case, a.device))
        a.to.write_text(json.dumps(measured), encoding="utf-8")  # what there is, while the rest is being measured


if __name__ == "__main__":
    main()
