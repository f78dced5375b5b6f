"""Planned against measured memory, of trainings and predictions of a real model.

    python benchmarks/plan.py
    python benchmarks/plan.py --device cuda --only training

Planned: `scalabl.planning`, from the model's configuration alone. Measured: the library's own run, each case in a
process of its own (`plan_step.py`). "Work" is the peak beyond the loaded model with its adapter: gradients, optimiser
states, batch, activations and whatever is temporary. The weights are no news.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _common import RESULTS, facts, load_average, markdown_facts, markdown_table, write_results, write_text
from training_cost import ALLOCATORS

MIB = 2**20
STEP = Path(__file__).with_name("plan_step.py")


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

    def recipe(self, model: str) -> dict[str, Any]:
        """Settings of a recipe."""
        own = {"method": self.method, "layers": self.layers, "dtype": self.dtype, "batch_size": self.batch}
        return own | {"model": model, "steps": 2, "gradient_checkpointing": self.gradient_checkpointing}

    def rows(self) -> dict[str, Any]:
        """What the rows are like."""
        return {"batch": self.batch, "length": self.length, "loss": self.loss, "scored": 32 * self.length // 128}


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


def measured(chosen: list[Case], model: str, device: str, threads: int) -> list[dict[str, Any]]:
    """What `plan_step.py` measures."""
    said = [{"what": c.what, "recipe": c.recipe(model), "rows": c.rows(), "samples": c.samples} for c in chosen]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | ALLOCATORS["peak_memory"]
    with tempfile.TemporaryDirectory() as directory:
        given, to = Path(directory) / "cases.json", Path(directory) / "measured.json"
        given.write_text(json.dumps(said), encoding="utf-8")
        line = [sys.executable, str(STEP), "--cases", str(given), "--to", str(to), "--device", device]
        made = subprocess.run([*line, "--threads", str(threads)], env=environment, stderr=subprocess.PIPE, text=True)
        if made.returncode:
            raise SystemExit(f"{made.stderr}\n{' '.join(line)} failed")
        found: list[dict[str, Any]] = json.loads(to.read_text(encoding="utf-8"))
    return found


def planned(case: Case, model: str, device: str) -> dict[str, int]:
    """Bytes of the model with its adapter, and of the work."""
    from scalabl.planning.plan import Planner
    from scalabl.planning.rows import PlannedRows
    from scalabl.runs.settings import Settings

    planner, rows = Planner(Settings.flat(**case.recipe(model)), device), PlannedRows(**case.rows())
    staying = planner.counts.weights + planner.counts.adapter
    if case.what == "training":
        stored = 2 * case.batch * case.length * planner.bytes_per_token if planner.stores_rows else 0
        peak = planner.training(PlannedRows(**case.rows(), stored=0 if device == "cuda" else stored)).peak
    else:
        peak = planner.prediction(rows, case.samples).peak
    return {"model": staying, "work": peak - staying}


def main() -> None:
    """Plan, measure, and write plan.csv, plan.json and plan.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the base, by name or directory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=("training", "prediction"), help="cases of one kind alone")
    parser.add_argument("--few", type=int, help="so many cases alone")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--name", default="plan", help="of the files")
    a = parser.parse_args()
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
    known = facts(
        model=a.model,
        data="random tokens, all rows of one length, a quarter of their tokens scored",
        seeds="0",
        adapters="q_proj, v_proj, r = 8",
        device=weighed[0]["device"],
        threads=str(a.threads),
        load=load_average(),
    )
    content = {"facts": known, "cases": rows}
    write_results(a.output, a.name, content, markdown(content))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(a.output / f"{a.name}.csv", text.getvalue())
    print(markdown(content))


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    errors = [abs(row["work_error"]) for row in content["cases"]]
    header = [
        "case",
        "precision",
        "rows",
        "work, planned",
        "work, measured",
        "error",
        "whole, planned",
        "measured",
        "error",
    ]
    lines = [
        [
            _title(row),
            row["dtype"],
            f"{row['batch']} x {row['length']}",
            f"{row['planned_work'] / MIB:,.0f} MiB",
            f"{row['measured_work'] / MIB:,.0f} MiB",
            f"{row['work_error']:+.1%}",
            f"{(row['planned_model'] + row['planned_work']) / MIB:,.0f} MiB",
            f"{(row['measured_model'] + row['measured_work']) / MIB:,.0f} MiB",
            f"{row['peak_error']:+.1%}",
        ]
        for row in content["cases"]
    ]
    within = f"{sum(error <= 0.15 for error in errors)} of {len(errors)}"
    median, largest = f"{statistics.median(errors):.1%}", f"{max(errors):.1%}"
    return f"""# Planned and measured memory

{markdown_table(header, lines)}

{within} works are within 15 % of what is measured; the median error is {median}, the largest {largest}.

Planned by `scalabl plan` from the model's configuration: the recipe's own step is run on torch's meta device, where a
tensor has a shape and no memory, and the bytes that are alive are followed. No figure of it is fitted to the
measurements. Measured: two steps of a training (the Trainer, its callbacks and AdamW), or the prediction of one batch
with all particles at once, each in a process of its own. "Work" is the peak beyond the loaded model with its adapter.
On a CPU it is the growth of the process, whose freed tensors go back to the system at once (`MALLOC_MMAP_THRESHOLD_`
and `MALLOC_TRIM_THRESHOLD_` at 65536), after the same work on one row of 4 tokens, with which libraries load and set up
what they use. "Whole" is work and model together, since the libraries were imported: what they and the tokenizer take
is in what was measured, and not in the plan.

{markdown_facts(content["facts"])}
"""


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
