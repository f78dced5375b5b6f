"""Training, prediction and decoding of Qwen2.5-7B, 14B and 32B shapes: plain LoRA, ScalaBL and BLoB side by side.

    python benchmarks/scale.py --device cuda
    python benchmarks/scale.py --models qwen2.5-32b --bits 4 --budget 300

Random weights of the published shapes, made on the device: nothing is fetched. It can be started blind: a cell is
skipped, and the reason kept, where it would not fit into the free memory or the remaining time; one that runs out of
memory or fails is noted, and the next begins. Results are written after every cell, and the same command does what is
missing. Writes scale.{csv,json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import scale_cells
import torch
from extra_parameters import SHAPES
from scale_cells import (
    LEAST,
    METHODS,
    WARMUP,
    Clock,
    OutOfTime,
    base_bytes,
    decode,
    give_back,
    predict,
    train,
    training_bytes,
)

STARTED = time.monotonic() - time.process_time()  # importing torch is a part of the time
BUDGET = 540.0
END = 15.0  # seconds kept back for the last results
# multiply-adds a second to begin with, on the small side; after a cell, what it took corrects them
SPEED = {("cuda", 16): 1.2e14, ("cuda", 4): 6e13, ("cpu", 16): 1e9, ("cpu", 4): 5e8}
BYTES_A_SECOND = {"cuda": 1e12, "cpu": 2e9}
LAUNCHES = 2e-3  # seconds a layer of a step that its kernels' launches alone may take
ADAPTER = {"cuda": 6.0, "cpu": 1.0}  # seconds to put an adapter on
TITLES = {"train": "Training", "predict": "Prediction", "decode": "Decoding"}
BASELINES = {"train": "lora", "predict": "one pass", "decode": "lora"}
AIMS = {"time_ratio": 1.02, "memory_ratio": 1.01}  # of a training step of ScalaBL, over plain LoRA's
COLUMNS = (
    "part", "model", "bits", "method", "batch", "step_seconds", "tokens_per_second", "peak_bytes", "time_ratio",
    "time_ratio_low", "time_ratio_high", "memory_ratio", "decode_tokens_per_second", "particles", "rounds", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        model: a shape.
        bits: of the base's weights.
        part: "train", "predict" or "decode".
        batch: rows.
    """

    model: str
    bits: int
    part: str
    batch: int

    @property
    def key(self) -> str:
        return f"{self.model}/{self.bits} bit/{self.part}/batch {self.batch}"


class Study:
    """The cells with what is known of them; `kept` is the file that a later start goes on from."""

    def __init__(self, a: argparse.Namespace, clock: Clock) -> None:
        self.a = a
        self.clock = clock
        self.kept: Path = a.output / "scale.json"
        self.device_name = device_name(a.device)
        self.settings = {name: getattr(a, name) for name in ("length", "steps", "samples", "new_tokens", "seed")}
        self.settings |= {"device": self.device_name, "methods": list(METHODS)}
        self.known: dict[str, Any] = {}
        if self.kept.is_file():
            self.known = json.loads(self.kept.read_text(encoding="utf-8"))["cells"]
        if any(cell["settings"] != self.settings for cell in self.known.values()):
            raise SystemExit(f"{self.kept} is of other settings or of another device; choose another --output.")
        self.slower: dict[tuple[int, str], float] = {}  # (bits, part) -> time taken over time estimated

    def cells(self) -> dict[tuple[str, int], list[Cell]]:
        """(model, bits) -> its cells, in the order in which they are done: what matters most comes first."""
        found = {}
        for bits in self.a.bits:
            for model in self.a.models:
                parts = [("train", batch) for batch in self.a.batches] + [("decode", 1)]
                parts += [("predict", batch) for batch in self.a.batches]
                found[model, bits] = [Cell(model, bits, part, batch) for part, batch in parts if part in self.a.parts]
        return found

    def is_done(self, cell: Cell) -> bool:
        return self.known.get(cell.key, {}).get("status") == "done"

    def note(self, cell: Cell, status: str, **content: Any) -> None:
        """Keep what became of a cell."""
        about = {"model": cell.model, "bits": cell.bits, "part": cell.part, "batch": cell.batch, "status": status}
        self.known[cell.key] = about | {"settings": self.settings} | content
        found, known = rows(self.known), known_facts(self)
        results, lines = {"facts": known, "rows": found, "cells": self.known}, harness.as_csv(found, COLUMNS)
        page = markdown(found, self.known, known)
        harness.write_results(self.a.output, "scale", results, page, lines, show=False)
        print(f"{cell.key}: {status}{': ' + content['reason'] if 'reason' in content else ''}", flush=True)

    def run(self) -> None:
        """Do what is not done."""
        for (model, bits), cells in self.cells().items():
            for cell in cells:
                if self.is_done(cell):
                    print(f"{cell.key}: known", flush=True)
            todo = [cell for cell in cells if not self.is_done(cell)]
            # what cannot be done is not worth a base model
            todo = [cell for cell in todo if self._is_possible(cell, built=False)]
            if todo:
                self._on_one_base(model, bits, todo)

    def _on_one_base(self, model: str, bits: int, todo: list[Cell]) -> None:
        base: Any = None

        def make() -> dict[str, Any]:
            nonlocal base
            base = scale_cells.build(model, bits, self.a.device, self.a.seed)
            return {}

        _, reason = attempt(make)
        for cell in todo:
            if reason is not None:
                self.note(cell, "failed", reason=f"the base model: {reason}")
            elif self._is_possible(cell, built=True):
                self._measure(cell, base)
            give_back()
        base = None
        give_back()

    def _is_possible(self, cell: Cell, *, built: bool) -> bool:
        """Whether the free memory and the remaining time suffice by an estimate; keeps the reason where not."""
        needed = self.bytes_of(cell) - (base_bytes(cell.model, cell.bits) if built else 0)
        free = scale_cells.free_bytes(self.a.device)
        seconds = self.seconds_of(cell) + (0 if built else self.seconds_of_base(cell))
        left = self.clock.left() - END
        if needed > free:
            reason = f"it takes about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free"
        elif seconds > left:
            reason = f"it takes about {seconds:.0f} s, and {max(0.0, left):.0f} are left of {self.a.budget:.0f}"
        else:
            return True
        self.note(cell, "skipped", reason=reason)
        return False

    def _measure(self, cell: Cell, base: Any) -> None:
        a, inner = self.a, Clock(self.clock.left() - END)
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "train": lambda: train(base, cell.batch, a.length, a.steps, a.seed, inner),
            "predict": lambda: predict(base, cell.batch, a.length, a.samples, a.rounds, a.seed, inner),
            "decode": lambda: decode(base, a.length, a.new_tokens, a.samples, a.rounds, a.seed, inner),
        }
        estimated, before = self.seconds_of(cell), inner.left()
        found, reason = attempt(work[cell.part])
        if reason is not None:
            self.note(cell, "failed", reason=reason)
            return
        took = before - inner.left()
        self.slower[cell.bits, cell.part] = self.slower.get((cell.bits, cell.part), 1.0) * took / estimated
        lines = {name: line for name, line in found.items() if isinstance(line, dict)}
        self.note(cell, "done", seconds=round(took, 1), commit=known_facts(self).get("commit", ""), lines=lines)

    def bytes_of(self, cell: Cell) -> int:
        """An estimate of a cell's peak, its base model included."""
        if cell.part == "train":
            return round(1.02 * training_bytes(cell.model, cell.bits, cell.batch * self.a.length, METHODS))
        config = SHAPES[cell.model].config()
        # particles come in chunks that fit; one forward pass of the rows has to
        return base_bytes(cell.model, cell.bits) + 8 * cell.batch * self.a.length * (
            config.hidden_size + config.intermediate_size
        )

    def seconds_of(self, cell: Cell) -> float:
        """An estimate of the least time in which a cell says something."""
        a, kind, config = self.a, self.a.device.partition(":")[0], SHAPES[cell.model].config()
        tokens, layers = cell.batch * a.length, config.num_hidden_layers
        forward = 2 * SHAPES[cell.model].parameters * tokens / SPEED[kind, cell.bits] + LAUNCHES * layers / 3
        rounds = min(LEAST, a.steps if cell.part == "train" else a.rounds)
        if cell.part == "train":  # a forward pass, another one to recompute it, and a backward pass to activations
            seconds = len(METHODS) * (3 * forward * (WARMUP + rounds + 2) + 2 * ADAPTER[kind])
        elif cell.part == "predict":  # one pass, N, and N or as many as linearising takes; what auto tries is as much
            seconds = (2 + rounds) * (1 + 2 * a.samples) * forward + ADAPTER[kind]
        else:
            token = base_bytes(cell.model, cell.bits) / BYTES_A_SECOND[kind] + LAUNCHES * layers
            seconds = 3 * (2 + rounds) * (a.new_tokens * token + forward * a.samples) + 2 * ADAPTER[kind]
        return 1.1 * seconds * self.slower.get((cell.bits, cell.part), 1.0)

    def seconds_of_base(self, cell: Cell) -> float:
        """An estimate, on the large side, of how long drawing its weights takes."""
        kind = self.a.device.partition(":")[0]
        return 3 + 50 * 2 * SHAPES[cell.model].parameters / BYTES_A_SECOND[kind]


def attempt(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """What it gives, or why it does not; the traceback, which would keep its tensors alive, is gone by then."""
    try:
        return work(), None
    except OutOfTime as error:
        return {}, str(error)
    except torch.OutOfMemoryError as error:
        return {}, f"out of memory: {first_line(error)}"
    except Exception as error:  # one cell must not take the others along: nobody may be there to start again
        return {}, f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return harness.cpu_name()
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def known_facts(study: Study) -> dict[str, str]:
    a = study.a
    return harness.facts(
        data=f"rows of {a.length} random tokens",
        weights="random, of the published shapes; bfloat16, or nf4 with double quantisation",
        adapters="q_proj, v_proj, lm_head of every layer, r = 8, float32; AdamW, gradients clipped",
        training=f"{a.steps} steps a method with gradient checkpointing, in turn, in random order; loss of all tokens",
        prediction=f"{a.samples} particles, 4 choices, the last position's logits; {a.rounds} rounds",
        decoding=f"{a.new_tokens} new tokens behind {a.length}, KV cache, greedy; {a.rounds} rounds",
        seeds=str(a.seed),
        device=study.device_name,
    )


def rows(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a line of a finished cell, with the columns of `COLUMNS`; ratios are paired by round."""
    return [
        _row(cell, name, line, cell["lines"][BASELINES[cell["part"]]])
        for cell in cells.values()
        if cell["status"] == "done"
        for name, line in cell["lines"].items()
        if "seconds" in line
    ]


def _row(cell: dict[str, Any], name: str, line: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    seconds = statistics.median(line["seconds"])
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {key: cell[key] for key in ("part", "model", "bits", "batch")}
    row |= {"method": name, "step_seconds": seconds, "peak_bytes": line["peak"], "rounds": len(line["seconds"])}
    if cell["part"] == "decode":
        row |= {"particles": line["particles"], "decode_tokens_per_second": line["particles"] / seconds}
    else:
        row["tokens_per_second"] = cell["batch"] * cell["settings"]["length"] / seconds
    if "seconds" in base:
        ratio = harness.median_with_interval([a / b for a, b in zip(line["seconds"], base["seconds"], strict=True)])
        row |= {"time_ratio": ratio["median"], "time_ratio_low": ratio["low"], "time_ratio_high": ratio["high"]}
        row["memory_ratio"] = line["peak"] / base["peak"]
    if "choice" in line:
        row["note"] = f"{line['choice']}; chosen in {line['choice_seconds']:.1f} s"
    return row


def markdown(found: list[dict[str, Any]], cells: dict[str, Any], known: dict[str, str]) -> str:
    """The results as a page."""
    parts = ["# Cost at the shapes of Qwen2.5"]
    for part, title in TITLES.items():
        of_part = [row for row in found if row["part"] == part]
        parts += [f"## {title}", _table(part, of_part)] if of_part else []
    parts += [_aims(found), _reasons(cells)]
    parts.append(
        "Times are medians over rounds, in each of which every line was measured once, in random order; a ratio is the "
        "median of the ratios of one round to its first line, with its 95 % bootstrap interval. Peak: of the device's "
        "tensors, base included (on a CPU: of the process), measured apart with one adapter on the base at a time. The "
        "time of `auto` is that of what it chose, which it does once for all rows. New tokens a second are those of "
        "all particles together, behind the first token."
    )
    return "\n\n".join([part for part in parts if part] + [harness.markdown_facts(known)])


def _table(part: str, found: list[dict[str, Any]]) -> str:
    speed = "decode_tokens_per_second" if part == "decode" else "tokens_per_second"
    line = "predictive" if part == "predict" else "method"
    step = {"train": "step", "predict": "a batch", "decode": "a token"}[part]
    return harness.table(
        found,
        ("model", lambda row: SHAPES[row["model"]].title),
        ("bits", "{bits}"),
        ("batch", "{batch}"),
        (line, lambda row: row["method"] + (f" ({row['note']})" if row["note"] else "")),
        (f"{step}, ms", lambda row: f"{1000 * row['step_seconds']:,.1f}"),
        (f"time over {BASELINES[part]}", _ratio),
        ("tokens / s", lambda row: f"{row[speed]:,.0f}"),
        ("peak, GiB", lambda row: f"{row['peak_bytes'] / 2**30:,.2f}"),
        ("memory over it", lambda row: "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.4f}"),
    )


def _ratio(row: dict[str, Any]) -> str:
    if row["time_ratio"] is None:
        return ""
    if row["method"] == BASELINES[row["part"]]:
        return "1"
    return f"{row['time_ratio']:.3f} ({row['time_ratio_low']:.3f} to {row['time_ratio_high']:.3f})"


def _aims(found: list[dict[str, Any]]) -> str:
    """Whether a training step of ScalaBL costs no more than it may."""
    steps = [row for row in found if row["part"] == "train" and row["method"] == "scalabl"]
    lines = []
    for name, most in AIMS.items() if steps else ():
        missed = [
            f"{SHAPES[row['model']].title} at {row['bits']} bit, batch {row['batch']} ({row[name]:.3f})"
            for row in steps
            if row[name] > most
        ]
        what = f"{name.partition('_')[0].capitalize()} of a ScalaBL step within {most} of plain LoRA's"
        many = f"{len(steps) - len(missed)} of {len(steps)}"
        lines.append(f"- {what}: {many}{'; not ' if missed else ''}{', '.join(missed)}.")
    return "\n".join(lines)


def _reasons(cells: dict[str, Any]) -> str:
    """What was not measured, and why not."""
    lines = [f"- {key}: {cell['status']}, {cell['reason']}" for key, cell in cells.items() if "reason" in cell]
    for key, cell in cells.items():
        of_lines = cell.get("lines", {}).items()
        lines += [f"- {key}, {name}: {line['reason']}" for name, line in of_lines if "reason" in line]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""


def parse() -> argparse.Namespace:
    parser = harness.options(
        __doc__,
        models=(["qwen2.5-7b", "qwen2.5-32b", "qwen2.5-14b"], None, SHAPES),
        bits=([16, 4], None, [16, 4]),
        parts=(list(TITLES), None, TITLES),
        batches=([1, 4], "rows a step and a prediction"),
        length=(300, "tokens of a row"),
        steps=(20, "of each method, that count"),
        rounds=(5, "of predictions and of decoding"),
        samples=(10, "particles, N"),
        new_tokens=24,
        seed=0,
        device=("cuda", "cuda, or cpu"),
        budget=(BUDGET, "seconds in which it ends"),
        output=(harness.RESULTS, "directory of the results"),
    )
    a = parser.parse_args()
    for name, least in {"steps": 1, "rounds": 1, "samples": 1, "new_tokens": 2, "length": 2}.items():
        if getattr(a, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if min(a.batches) < 1:
        parser.error("--batches must be at least 1")
    return a


def main(started: float | None = None) -> None:
    """Do what is missing, and write the results after every cell; `started`: when the time began to run."""
    a = parse()
    clock = Clock(a.budget - (0.0 if started is None else time.monotonic() - started))
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # 32B leaves no room for gaps
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("No CUDA device is there; choose --device cpu with --models tiny.")
    Study(a, clock).run()
    print((a.output / "scale.md").read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    main(STARTED)
