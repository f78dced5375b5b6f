"""The tidy table: a row for each entry and set that it was tested on, raw and with a temperature.

method, task, trained_on, seed          what; "x+temperature" has a temperature on its class logits; `seed` is the first
                                        one of an ensemble, all are in `seeds`
accuracy, nll, ece, brier               nll in nats, ece a share (15 bins)
ood_auroc                               shifted sets: separated from the trained task's test set by the epistemic part
                                        of the uncertainty (empty for one particle); `ood_auroc_total` by all of it
extra_parameters                        numbers kept beyond a plain LoRA's
train_cost, predict_cost                wall time as a ratio to MLE's of the same task, on the same machine since it was
                                        started; of the same seed where that was done there; empty where none was
collapsed                               whether its accuracy is no better than guessing; `why` says by what guess
n, particles                            rows tested on, N
auroc, aurc                             auroc: of being right by confidence
validation_nll                          on the validation rows of its training task: what settings are chosen by; empty
                                        in tempered rows, whose temperature was fitted there
temperature                             fitted on validation rows; empty in raw rows
peak_memory                             MiB, the highest of its cells
scoring, device, versions               the machine that predicted

Costs are single measurements on a machine that does other things too (of a process of one thread, the time in which it
had a core): differences of a tenth mean nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from scalabl.core.console import visible
from scalabl.core.files import write_text, writing
from scalabl.study.cells import below_of, finished, place_of
from scalabl.study.outcomes import outcomes
from scalabl.study.plan import Entry, StudyPlan, baselines_of
from scalabl.study.study import Study

_TEXT, _INT, _FLOAT = pyarrow.string(), pyarrow.int64(), pyarrow.float64()
SCHEMA = pyarrow.schema(
    [
        *((name, _TEXT) for name in ("method", "task", "trained_on")),
        ("seed", _INT),
        *((name, _FLOAT) for name in ("accuracy", "nll", "ece", "brier", "ood_auroc")),
        ("extra_parameters", _INT),
        *((name, _FLOAT) for name in ("train_cost", "predict_cost")),
        ("collapsed", pyarrow.bool_()),
        *((name, _INT) for name in ("n", "particles")),
        *((name, _FLOAT) for name in ("auroc", "aurc", "ood_auroc_total", "validation_nll", "temperature")),
        ("peak_memory", _FLOAT),
        *((name, _TEXT) for name in ("why", "seeds", "scoring", "cell", "device", "versions")),
    ]
)


def tidy(study: Study, plan: StudyPlan, output: Path) -> list[dict[str, Any]]:
    """The rows of every finished entry, in the plan's order, with the columns of `SCHEMA`."""
    rows = []
    for entry in plan.entries:
        done = finished(output, entry.prediction)
        # a cell that was deleted to be done again takes its entry out of the table until then
        if done is None or any(finished(output, address) is None for address in entry.addresses):
            continue
        facts = {
            "trained_on": entry.task,
            "seed": entry.seeds[0],
            "seeds": " ".join(map(str, entry.seeds)),
            "scoring": _done(output, entry.training[0])["scoring"],
            "cell": entry.prediction,
            "device": done["device"],
            "versions": done["versions"],
            **_costs(entry, baselines_of(study, plan, entry), output),
        }
        extra = _extra_parameters(entry, output)
        for outcome in outcomes(plan.cells[entry.prediction], output, entry.variant.name):
            tempered = outcome.figures["temperature"] is not None
            row = {"method": outcome.method, "task": outcome.task, **outcome.figures, **facts}
            row["extra_parameters"] = extra + tempered
            rows.append({name: row.get(name) for name in SCHEMA.names})
    return rows


def _extra_parameters(entry: Entry, output: Path) -> int:
    if entry.post_hoc:
        return int(_done(output, entry.post_hoc)["extra_parameters"])
    return int(_done(output, entry.training[0])["parameters"]["variational"])


def _costs(entry: Entry, baselines: Sequence[Entry], output: Path) -> dict[str, float | None]:
    """Beside the first MLE's that was done on the same machine: a processor of the same name may be half as fast."""
    own = _measured(entry, output)
    costs: dict[str, float | None] = {"peak_memory": own.peak_memory}
    for mle in (_measured(each, output) for each in baselines if finished(output, each.prediction) is not None):
        if own.machine is not None and own.machine == mle.machine:
            return costs | {"train_cost": own.training / mle.training, "predict_cost": own.prediction / mle.prediction}
    return costs


@dataclass(frozen=True)
class _Measured:
    """Seconds and MiB of a prediction and the cells below it, and where; None where these are of several machines."""

    machine: tuple[str, str | None] | None
    training: float
    prediction: float
    peak_memory: float


def _measured(entry: Entry, output: Path) -> _Measured:
    done = _done(output, entry.prediction)
    place, cells = place_of(done), [_done(output, address) for address in entry.addresses[:-1]]
    below = done.get("below") or below_of(cells, place).get("below")
    if below is None:
        return _Measured(None, 0.0, done["seconds"], max(cell["peak_memory"] for cell in (*cells, done)))
    training = below["seconds"] + done.get("fit_seconds", 0.0)  # of a calibration, once for all that is predicted
    return _Measured(place, training, done["seconds"], max(below["peak_memory"], done["peak_memory"]))


def _done(output: Path, address: str) -> dict[str, Any]:
    done = finished(output, address)
    assert done is not None, address
    return done


def write_tables(rows: list[dict[str, Any]], directory: Path) -> None:
    """results.csv and results.parquet, each whole or not at all."""
    write_text(directory / "results.csv", csv_of(rows, SCHEMA.names))
    with writing(directory / "results.parquet") as unfinished:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), unfinished)


def _as_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return visible(f"'{value}" if value.startswith(("=", "+", "-", "@", "\t")) else value)


def csv_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as CSV with a line of names; None is empty. Text that a spreadsheet would run has an apostrophe in front."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _as_text(value) for name, value in row.items()} for row in rows)
    return text.getvalue()
