"""Training step and peak memory of ScalaBL and of PEFT's MonteCLoRA, as ratios to plain PEFT LoRA.

    python benchmarks/training_cost.py
    python benchmarks/training_cost.py --shape qwen2.5-7b --device cuda --dtype bfloat16 --length 300

Time: one process steps all methods, one step each a round, in an order drawn anew for each round; a ratio is of the
two steps of one round. Memory: every run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import (
    RESULTS,
    facts,
    interleaved,
    load_average,
    markdown_facts,
    markdown_table,
    median_with_interval,
    write_results,
)
from methods import METHODS, RANK, TARGETS

BASELINE = next(iter(METHODS))
# glibc keeps freed memory for later by a threshold that moves with the history of a process, which alone moves the
# peak by some per cent; with a fixed one every large tensor is given back at once, and the peak is what lives
ALLOCATORS = {
    "peak_memory": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    "peak_memory_default_allocator": {},
}


def child(arguments: argparse.Namespace, allocator: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Run `training_step.py`, with the environment of an allocator, and return what it measured."""
    settings = {name: getattr(arguments, name) for name in ("device", "dtype", "batch", "length", "seed", "threads")}
    settings |= {"shape": arguments.shape} if arguments.shape else {"model": arguments.model}
    threads = str(arguments.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | (allocator or {})
    with tempfile.TemporaryDirectory() as directory:
        to = Path(directory) / "measured.json"
        line = [sys.executable, str(Path(__file__).with_name("training_step.py")), "--to", str(to)]
        for name, value in (settings | options).items():
            line += [f"--{name}", *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
        made = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if made.returncode:
            raise SystemExit(f"{made.stderr}\n{' '.join(line)} failed")
        measured: dict[str, Any] = json.loads(to.read_text(encoding="utf-8"))
    return measured


def ratios(values: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Method -> the ratios to the baseline of the same round, with their median and its interval."""
    found = {}
    for name, own in values.items():
        of_rounds = [value / base for value, base in zip(own, values[BASELINE], strict=True)]
        found[name] = median_with_interval(of_rounds) | {"ratios": [round(ratio, 5) for ratio in of_rounds]}
    return found


def weigh(arguments: argparse.Namespace, methods: list[str], allocator: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Method -> the ratios of its peak memory to the baseline's, and the peaks in MiB, each of a process of its own."""

    def measure(method: str) -> dict[str, Any]:
        return child(arguments, allocator, measure="memory", methods=[method], rounds=arguments.memory_steps)

    runs = interleaved(methods, arguments.memory_repeats, arguments.seed, measure)
    mib = {
        name: {f"{key}_mib": [round(run[key] / 2**20, 1) for run in own] for key in ("peak", "before_training")}
        for name, own in runs.items()
    }
    peaks = ratios({name: [run["peak"] for run in own] for name, own in runs.items()})
    return {name: peaks[name] | mib[name] for name in methods}


def main() -> None:
    """Measure, and write training_cost.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the base, by name or directory")
    parser.add_argument("--shape", help="random weights in a published shape instead, such as qwen2.5-7b")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=4, help="rows of the batch")
    parser.add_argument("--length", type=int, default=96, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them")
    parser.add_argument("--memory-repeats", type=int, default=3, help="processes of each method")
    parser.add_argument("--memory-steps", type=int, default=3, help="optimiser steps of each of them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--name", default="training_cost", help="of the two files")
    a = parser.parse_args()

    load = [load_average()]
    methods = [name for name in METHODS if name in (BASELINE, *a.methods)]
    timed = child(a, measure="time", methods=methods, rounds=a.rounds, warmup=a.warmup)
    load.append(load_average())
    weighed = {key: weigh(a, methods, allocator) for key, allocator in ALLOCATORS.items()}
    wall = ratios({name: [step[0] for step in steps] for name, steps in timed["steps"].items()})
    processor = ratios({name: [step[1] for step in steps] for name, steps in timed["steps"].items()})
    known = facts(
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
    write_results(a.output, a.name, content, markdown(content))
    print(markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    rows = []
    for result in content["methods"].values():
        cells = [_cell(result[key]) for key in ("step_wall", "step_processor", *ALLOCATORS)]
        mib = f"{statistics.median(result['peak_memory']['peak_mib']):,.0f} MiB"
        rows.append([result["title"], *cells, mib])
    header = ["method", "step, wall clock", "step, processor time", "peak memory", "with the default allocator", "peak"]
    return f"""# Training cost, relative to plain LoRA

{markdown_table(header, rows)}

Step: median over rounds of the ratio of two steps of the same round, with its 95 % bootstrap interval. Memory: the
peak of the whole process (base, adapters, optimiser and activations; on a GPU of its tensors), median ratio with the
smallest and largest. "Peak memory" is measured with large tensors given back to the system as soon as they are freed
(`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` at 65536), so that it is the memory in use; glibc's default
keeps some of it, how much differs from run to run. MonteCLoRA draws the noise of `buffer_size` (150) steps ahead for
every layer: that is its peak, and the steps that fill the buffer again are outliers which a median leaves out.

{markdown_facts(content["facts"])}
"""


def _cell(ratio: dict[str, Any]) -> str:
    if set(ratio["ratios"]) == {1.0}:
        return "1"
    few = ratio["n"] < 10
    low, high = (min(ratio["ratios"]), max(ratio["ratios"])) if few else (ratio["low"], ratio["high"])
    return f"{ratio['median']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
