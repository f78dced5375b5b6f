"""Planned against measured memory, of trainings and predictions of a real model.

    python benchmarks/plan.py
    python benchmarks/plan.py --device cuda --only training

Planned: `scalabl.planning`, from the model's configuration alone. Measured: the library's own run (the Hugging Face
Trainer with its callbacks, for two steps) or its own predictive; only the rows are made up, all of one length. "Work"
is the peak beyond the loaded model with its adapter: gradients, optimiser states, batch, activations and whatever is
temporary; the weights are no news. On a CPU the growth of the process is measured, on a GPU that of its tensors.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch
from peft import PeftModel, get_peft_model
from training_cost import ALLOCATORS

from scalabl.core.files import write_text
from scalabl.planning.plan import Planner
from scalabl.planning.step import PlannedRows
from scalabl.predictive import MeanPredictive, MonteCarloPredictive, predict
from scalabl.runs.method import load_method
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring import Continuation, Encoded, Letters, Scorer, Scoring
from scalabl.scoring.trunk import Trunk
from scalabl.training.run import optimise

MIB = 2**20
STEPS = 2  # the second one has the optimiser's states
_SHORT = 4  # tokens


@dataclass(frozen=True)
class Case:
    """What is planned and measured.

    Attributes:
        what: "training" or "prediction".
        method, layers, dtype, gradient_checkpointing: as in a recipe.
        batch, length: rows and their tokens.
        loss: whose logits are read.
        samples: N of a prediction.
    """

    what: str
    method: str = "scalabl"
    layers: str = "all"
    batch: int = 2
    length: int = 128
    gradient_checkpointing: bool = False
    dtype: str = "float32"
    loss: str = "continuation"
    samples: int = 10

    def settings(self, model: str) -> Settings:
        return Settings.flat(
            model=model, method=self.method, layers=self.layers, dtype=self.dtype, batch_size=self.batch, steps=STEPS,
            gradient_checkpointing=self.gradient_checkpointing,
        )  # fmt: skip

    def rows(self, **more: Any) -> PlannedRows:
        """What the rows are like."""
        return PlannedRows(batch=self.batch, length=self.length, loss=self.loss, scored=32 * self.length // 128, **more)


def cases() -> list[Case]:
    """The cases of the table: one thing changed at a time, around 2 and 8 rows of 128 tokens."""
    made = [
        Case("training", method, batch=batch, gradient_checkpointing=saved)
        for method in ("mle", "scalabl")
        for batch in (2, 8)
        for saved in (False, True)
    ]
    made += [Case("training", batch=2, length=384, gradient_checkpointing=saved) for saved in (False, True)]
    made += [Case("training", method, layers="last:8", batch=8) for method in ("mle", "scalabl")]
    made += [Case("training", dtype="bfloat16", batch=8, gradient_checkpointing=saved) for saved in (False, True)]
    made += [Case("training", "blob", batch=8), Case("training", batch=8, loss="letters")]
    made += [Case("training", "mle", batch=8, loss="tokens")]
    made += [Case("prediction", batch=batch, samples=samples) for batch in (2, 8) for samples in (1, 10)]
    made += [Case("prediction", batch=2, length=384, samples=10), Case("prediction", layers="last:8", batch=8)]
    made += [Case("prediction", batch=8, dtype="bfloat16")]
    return made


def planned(case: Case, model: str, device: str) -> dict[str, int]:
    """Bytes of the model with its adapter, and of the work."""
    planner = Planner(case.settings(model), device)
    staying = planner.counts.weights + planner.counts.adapter
    if case.what == "training":
        stored = 2 * case.batch * case.length * planner.bytes_per_token if planner.stores_rows else 0
        peak = planner.training(case.rows(stored=0 if device == "cuda" else stored)).peak
    else:
        peak = planner.prediction(case.rows(), case.samples).peak
    return {"model": staying, "work": peak - staying}


def measured(chosen: list[Case], model: str, device: str, threads: int) -> list[dict[str, Any]]:
    """What this script measures of the cases in a process whose allocator gives freed memory back at once."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | ALLOCATORS["peak_memory"]
    with tempfile.TemporaryDirectory() as directory:
        given, to = Path(directory) / "cases.json", Path(directory) / "measured.json"
        write_text(given, json.dumps([asdict(case) for case in chosen]))
        line = [sys.executable, __file__, "--cases", str(given), "--to", str(to), "--device", device]
        line += ["--threads", str(threads), "--model", model]
        made = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if made.returncode:
            raise SystemExit(f"{made.stderr}\n{' '.join(line)} failed")
        found: list[dict[str, Any]] = json.loads(to.read_text(encoding="utf-8"))
    return found


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


def adapted(settings: Settings, device: str) -> tuple[PeftModel, Any]:
    """The model with its adapter, every weight of it in memory, and its tokenizer."""
    base, tokenizer = load_base(settings.model, dtype=settings.machine.dtype, bits=settings.machine.bits, device=device)
    model: Any = get_peft_model(base, load_method(settings.method).adapter_config(settings, base))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # mapped files come into memory at their first use
    base.tie_weights()
    return model, tokenizer


def train(model: PeftModel, settings: Settings, rows: PlannedRows, scoring: Scoring) -> None:
    """Two steps."""
    encoded = encoded_rows(rows, STEPS * rows.batch, model.config.vocab_size)
    if rows.loss == "tokens":
        return train_on_tokens(model, settings, torch.tensor([row.input_ids for row in encoded]), rows.batch)
    trunk = None if settings.optimisation.gradient_checkpointing else Trunk(model)
    if trunk is not None and trunk.depth:
        shape = (rows.length, model.config.get_text_config().hidden_size)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        # the run keeps what the frozen layers give for all rows
        for i, row in enumerate(encoded):
            encoded[i] = Encoded(**{**vars(row), "trunk": torch.randn(shape, dtype=dtype)})
    with tempfile.TemporaryDirectory() as directory:
        optimise(settings, Path(directory), model, scoring, trunk, encoded)


def train_on_tokens(model: Any, settings: Settings, ids: torch.Tensor, batch: int) -> None:
    """Plain supervised fine-tuning: the loss of every token."""
    if settings.optimisation.gradient_checkpointing:
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


def measure(case: Case, base: str, device: str) -> dict[str, Any]:
    """Bytes of the model with its adapter, and of the work on top of them."""
    settings, rows = case.settings(base), case.rows()
    scales = Scales(torch.device(device))
    scales.reset()
    empty = scales.now()
    model, tokenizer = adapted(settings, device)
    letters = Letters(tokenizer, num_letters=rows.choices)
    scoring = letters if rows.loss == "letters" else Continuation(tokenizer, normalization="token")

    def work(settings: Settings, rows: PlannedRows) -> None:
        if case.what == "training":
            train(model, settings, rows, scoring)
        else:
            answer(model, rows, scoring, case.samples)
        model.zero_grad(set_to_none=True)

    # one short row first: what libraries load and set up at their first use is not the work's
    work(settings.changed(batch_size=1), replace(rows, batch=1, length=_SHORT))
    scales.reset()
    loaded = scales.now()
    work(settings, rows)
    name = torch.cuda.get_device_name() if device == "cuda" else harness.cpu_name()
    return {"model": loaded - empty, "work": scales.peak() - loaded, "device": name}


def in_a_fork(case: Case, model: str, device: str) -> dict[str, Any]:
    """`measure` in a process of its own, forked when nothing but libraries is in memory.

    Raises:
        SystemExit: it failed; its traceback is on standard error.
    """
    forked = multiprocessing.get_context("fork")
    receiver, sender = forked.Pipe(duplex=False)
    process = forked.Process(target=lambda: sender.send(measure(case, model, device)))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{case} failed") from None
    process.join()
    return found


def main() -> None:
    """Plan, measure, and write plan.csv, plan.json and plan.md."""
    parser = harness.options(
        __doc__,
        model=("smollm2-135m-instruct", "the base, by name or directory"),
        device=("cpu", None, ("cpu", "cuda")),
        only=(None, "cases of one kind alone", ("training", "prediction")),
        few=(len(cases()), "so many cases alone"),
        threads=1,
        output=(harness.RESULTS, "directory of the results"),
        name=("plan", "of the files"),
        cases=(None, "a JSON list of cases: measure these alone, in this process"),
        to=(Path(), "where what it measures goes"),
    )
    a = parser.parse_args()
    if a.cases:
        torch.set_num_threads(a.threads)
        torch.manual_seed(0)
        given = [Case(**case) for case in json.loads(Path(a.cases).read_text(encoding="utf-8"))]
        write_text(a.to, json.dumps([in_a_fork(case, a.model, a.device) for case in given]))
        return
    chosen = [case for case in cases() if a.only in (None, case.what)][: a.few]
    weighed = measured(chosen, a.model, a.device, a.threads)
    rows = []
    for case, found in zip(chosen, weighed, strict=True):
        plan = planned(case, a.model, a.device)
        rows.append(
            asdict(case)
            | {f"planned_{name}": size for name, size in plan.items()}
            | {f"measured_{name}": found[name] for name in plan}
            | {f"{name}_error": round(size / found[name] - 1, 4) for name, size in plan.items()}
            | {"peak_error": round(sum(plan.values()) / (found["model"] + found["work"]) - 1, 4)}
        )
    known = harness.facts(
        model=a.model,
        data="random tokens, all rows of one length, a quarter of their tokens scored",
        seeds="0",
        adapters="q_proj, v_proj, r = 8",
        device=weighed[0]["device"],
        threads=str(a.threads),
        load=harness.load_average(),
    )
    content = {"facts": known, "cases": rows}
    harness.write_results(a.output, a.name, content, markdown(content), harness.as_csv(rows))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    errors = [abs(row["work_error"]) for row in content["cases"]]
    shown = harness.table(
        content["cases"],
        ("case", _title),
        ("precision", "{dtype}"),
        ("rows", "{batch} x {length}"),
        ("work, planned", lambda row: _mib(row["planned_work"])),
        ("work, measured", lambda row: _mib(row["measured_work"])),
        ("error", "{work_error:+.1%}"),
        ("whole, planned", lambda row: _mib(row["planned_model"] + row["planned_work"])),
        ("measured", lambda row: _mib(row["measured_model"] + row["measured_work"])),
        ("error", "{peak_error:+.1%}"),
    )
    within = f"{sum(error <= 0.15 for error in errors)} of {len(errors)}"
    median, largest = f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"
    return f"""# Planned and measured memory

{shown}

{within} works are within 15 % of what is measured; the median error is {median}, the largest {largest}.

Planned by `scalabl plan` from the model's configuration: the recipe's own step is run on torch's meta device, where a
tensor has a shape and no memory, and the bytes that are alive are followed. No figure of it is fitted to the
measurements. Measured: two steps of a training (the Trainer, its callbacks and AdamW), or the prediction of one batch
with all particles at once, each in a process of its own. "Work" is the peak beyond the loaded model with its adapter.
On a CPU it is the growth of the process, whose freed tensors go back to the system at once (`MALLOC_MMAP_THRESHOLD_`
and `MALLOC_TRIM_THRESHOLD_` at 65536), after the same work on one row of 4 tokens, with which libraries load and set up
what they use. "Whole" is work and model together, since the libraries were imported: what they and the tokenizer take
is in what was measured, and not in the plan.

{harness.markdown_facts(content["facts"])}
"""


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"


def _title(row: dict[str, Any]) -> str:
    layers = "" if row["layers"] == "all" else f", layers {row['layers']}"
    if row["what"] == "prediction":
        return f"prediction, N = {row['samples']}{layers}"
    names = {"mle": "plain LoRA", "scalabl": "ScalaBL", "blob": "BLoB"}
    read = {"continuation": "", "letters": ", letters", "tokens": ", loss of all tokens"}[row["loss"]]
    saved = ", checkpointing" if row["gradient_checkpointing"] else ""
    return f"training, {names[row['method']]}{layers}{read}{saved}"


if __name__ == "__main__":
    main()
