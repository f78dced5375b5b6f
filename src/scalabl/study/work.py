"""One cell done, and what it costs: time, memory, machine. The test split is read by prediction cells alone."""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.core import __version__
from scalabl.core.errors import UserError
from scalabl.core.files import sha256, write_json, writing
from scalabl.core.workers import processor
from scalabl.data.assemble import TrainingRows, select_rows
from scalabl.data.example import Example, rows_digest
from scalabl.data.load import load_task
from scalabl.inference.calibrate import fit_run
from scalabl.inference.predictor import Predictor
from scalabl.inference.settings import PredictionSettings
from scalabl.methods.saved import POST_HOC_DIRECTORY
from scalabl.metrics.calibration import row_losses
from scalabl.metrics.uncertainty import fit_temperature
from scalabl.predictive.auto import AutoPredictive
from scalabl.predictive.base import Predictive, predict
from scalabl.runs.loading import load_run
from scalabl.runs.method import Run, load_method, load_post_hoc
from scalabl.runs.registry import POST_HOC as POST_HOC_METHODS
from scalabl.runs.settings import Settings
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.study.cells import POST_HOC, PREDICTION, TRAINING, Cell, below_of, digest, finished, place_of
from scalabl.study.outcomes import outcomes
from scalabl.study.predictions import PREDICTIONS, UNLABELLED, VALIDATION
from scalabl.study.tested import overlap, rows_of_set, tuning_rows
from scalabl.training.checkpoints import last_checkpoint
from scalabl.training.run import read_log, train

RUN = "run"


def do(cell: Cell, output: Path) -> dict[str, Any]:
    """Do a cell whose needs are finished, and note down that it is; the caller holds its lock.

    Returns:
        what `finished.json` says: seconds, peak_memory (MiB), device, versions, wall (seconds with everything
        around it), and facts of the cell's kind.

    Raises:
        UserError: it cannot be done.
        Interrupted: Ctrl-C in training; the next call goes on from its checkpoint.
    """
    directory = cell.directory(output)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "settings.json", cell.as_dict())
    start = time.perf_counter()
    facts = {TRAINING: _train, POST_HOC: _fit, PREDICTION: _predict}[cell.kind](cell, output)
    facts |= machine() | {"label": cell.label, "wall": time.perf_counter() - start}
    write_json(directory / "finished.json", facts)
    (directory / "failed.json").unlink(missing_ok=True)
    if cell.kind == PREDICTION and cell.settings["test_sets"]:
        outcomes(cell, output, "")  # here, where others do theirs at the same time, and not when tables are made
    gc.collect()
    return facts


def _train(cell: Cell, output: Path) -> dict[str, Any]:
    training = Settings.flat(**cell.settings["recipe"])
    _require_same(training.data, cell.settings["rows_sha256"], rows_digest(tuning_rows(load_task(training.data))))
    directory = cell.directory(output) / RUN
    checkpoint = last_checkpoint(directory)
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    with measured() as cost:
        record = train(training, directory)
    log = read_log(directory)
    # the trainer's own time: steps alone, without loading and without the frozen layers, which other runs share
    steps = next(entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry)
    return {
        "seconds": cost.busy * steps * training.optimisation.steps / max(1, training.optimisation.steps - done),
        "peak_memory": cost.peak_memory,
        "resumed_from": done,
        "parameters": record.parameters,
        "scoring": record.scoring_name,
        "rows": record.rows,
        "task": record.task,
    }


def _fit(cell: Cell, output: Path) -> dict[str, Any]:
    method = load_post_hoc(cell.settings["method"])
    run = _loaded(cell.settings["run"], output, fitted=cell.address)
    rows = _rows_of(run)
    members = [output / "cells" / address / RUN for address in cell.settings["members"]]
    with measured() as cost:
        facts = method.fit(run, rows.train, rows.validation, members=members, seed=cell.settings["seed"])
    path = cell.directory(output) / POST_HOC_DIRECTORY / method.name / f"{method.name}.safetensors"
    saved = sum(t.numel() for t in load_file(path).values()) if path.is_file() else 0
    return {
        "seconds": cost.busy * cost.seconds,
        "peak_memory": cost.peak_memory,
        "extra_parameters": method.extra_numbers(run, facts, saved),
        "facts": {k: v for k, v in facts.items() if isinstance(v, int | float | bool)},
    }


def _predict(cell: Cell, output: Path) -> dict[str, Any]:
    settings = cell.settings
    run = _loaded(settings["run"], output, fitted=settings["post_hoc"])
    method, held_out = settings["method"], list(_rows_of(run).validation)
    choice, fit_seconds = None, {}
    if settings.get("predictive") == "calibrated":
        with measured() as cost:
            strategy, choice = _calibrated(run, held_out, settings)
        fit_seconds = {"fit_seconds": cost.busy * cost.seconds}
    elif "predictive" in settings:
        strategy = run.predictive(settings["predictive"], samples=settings["samples"], seed=settings["seed"])
    else:
        own = load_post_hoc(method) if method in POST_HOC_METHODS else load_method(method)
        strategy = own.predictive(run, samples=settings["samples"], seed=settings["seed"])
    data = settings.get("data", settings["task"])
    task = load_task(data)
    tensors: dict[str, Tensor] = {}

    def enter(name: str, rows: list[Example]) -> float:
        log_probs, seconds = _log_probs(run, rows, strategy, settings["batch_size"])
        tensors[f"{name}|log_probs"], tensors[f"{name}|labels"] = log_probs.contiguous(), _labels(rows)
        return seconds

    tuning = tuning_rows(task)
    limits = {name: settings[name] for name in ("test_rows", "shift_rows")}
    seconds, overlaps = {}, {}
    with measured() as cost:
        seconds[VALIDATION] = enter(VALIDATION, held_out)  # where auto chooses, it is by these rows
        for name, expected in settings["test_sets"].items():
            rows = rows_of_set(name, expected, task, of=settings["task"], data=data, **limits)
            _require_same(name, expected["sha256"], rows_digest(rows))
            seconds[name] = enter(f"test:{name}", rows)
            overlaps[name] = overlap(rows, tuning)
    path = cell.directory(output) / PREDICTIONS
    with writing(path) as unfinished:
        save_file(tensors, unfinished)
    if isinstance(strategy, AutoPredictive) and strategy.choice is not None:
        choice = strategy.choice.sentence
    return {
        # of its own test set; of validation rows where these alone are predicted
        "seconds": cost.busy * seconds.get(settings["task"], seconds[VALIDATION]),
        "peak_memory": cost.peak_memory,
        "validation_rows": len(held_out),
        "validation_nll": _losses(tensors[f"{VALIDATION}|log_probs"], tensors[f"{VALIDATION}|labels"]),
        "rows_also_tuned_on": overlaps,
        **({} if choice is None else {"choice": choice}),
        **fit_seconds,
        **_below(cell, output),
        "sha256": sha256(path),
    }


def _calibrated(run: Run, held_out: list[Example], settings: dict[str, Any]) -> tuple[Predictive, str]:
    """What a finished run is predicted by, at the scale of the posterior that these rows choose, and both in words; the
    temperature is fitted on what it predicts, as every method's."""
    chosen, size = PredictionSettings(samples=settings["samples"], seed=settings["seed"]), settings["batch_size"]
    calibration = fit_run(run, held_out, chosen, batch_size=size)
    calibrated = replace(run, record=replace(run.record, calibration=calibration.as_dict()))
    predictor = Predictor(calibrated, chosen, batch_size=size)
    predictor.resolve(held_out)
    return predictor.strategy, f"{predictor.settings.why} {calibration.in_words()}"


def _losses(log_probs: Tensor, labels: Tensor) -> dict[str, float | None]:
    """NLL in nats of validation rows, as they are ("raw") and with the temperature that suits them ("calibrated"); None
    where it is no number."""
    if log_probs.isnan().any():
        return {"raw": None, "calibrated": None, "temperature": None}
    t = fit_temperature(log_probs, labels)
    losses = {name: row_losses(log_probs, labels, each).mean().item() for name, each in (("raw", 1), ("calibrated", t))}
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()} | {"temperature": t}


def _labels(rows: Sequence[Example]) -> Tensor:
    """(n,) the right choices, `UNLABELLED` where a row has none."""
    return torch.tensor([UNLABELLED if row.answer is None else row.answer for row in rows])


def _loaded(address: str, output: Path, *, fitted: str | None) -> Run:
    """A training cell's run; what a post-hoc method fits or has fitted lies in the cell `fitted`."""
    run = load_run(output / "cells" / address / RUN)
    return replace(run, directory=output / "cells" / fitted) if fitted else run


def _rows_of(run: Run) -> TrainingRows:
    training = run.record.settings
    return select_rows(load_task(training.data), training.rows)


def _log_probs(run: Run, rows: list[Example], strategy: Predictive, batch_size: int) -> tuple[Tensor, float]:
    """Log class probabilities (N, n, C), and the seconds of the passes without the frozen layers, which are shared."""
    encoded = with_stored_trunk(run.scorer, run.encode(rows), batch_size=batch_size)
    start = time.perf_counter()
    log_probs = predict(run.scorer, encoded, strategy, batch_size=batch_size)
    return log_probs, time.perf_counter() - start


def _require_same(name: str, planned: str, found: str) -> None:
    if planned != found:
        raise UserError(f"The rows of {name} are not those that were planned with; run the benchmark again.")


_MIB = 2**20


@dataclass
class CellCost:
    """Wall time in seconds, and the peak memory in MiB: the accelerator's, or the process's on a CPU.

    Attributes:
        busy: share of the time in which a process of one thread had a core, which others may want too; 1 elsewhere.
    """

    seconds: float = 0.0
    peak_memory: float = 0.0
    busy: float = 1.0


@contextmanager
def measured() -> Iterator[CellCost]:
    """Context whose cost is known at its end."""
    cost = CellCost()
    _forget_peak()
    start, computed = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - start
        if not torch.cuda.is_available() and torch.get_num_threads() == 1:
            cost.busy = min(1.0, (time.process_time() - computed) / cost.seconds)
        cost.peak_memory = _peak() / _MIB


def _below(cell: Cell, output: Path) -> dict[str, Any]:
    """What the cells that a prediction needs came to, kept with it: another machine may do them again. Left out where
    they were done on others."""
    addresses = [cell.settings["run"]]
    if fitted := cell.settings["post_hoc"]:
        addresses += [fitted, *json.loads((output / "cells" / fitted / "settings.json").read_text())["members"]]
    cells = [facts for address in addresses if (facts := finished(output, address)) is not None]
    return below_of(cells, place_of(machine()))


def machine() -> dict[str, str]:
    """device: "cpu AMD EPYC, 2 cores, 1 thread a process" or the accelerator's name; machine: which one, since it was
    started; versions: of what computes."""
    if torch.cuda.is_available():
        device = f"cuda, {torch.cuda.get_device_name()}"
    else:
        threads = torch.get_num_threads()
        cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''} a process"
        device = f"cpu {processor()}, {cores}"
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    versions = ", ".join(f"{name} {number}" for name, number in {"scalabl": __version__, **packages}.items())
    started = ""
    with suppress(OSError):  # Linux alone says it
        started = Path("/proc/sys/kernel/random/boot_id").read_text()
    return {"device": device, "machine": digest([platform.node(), started])[:8], "versions": versions}


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew


def _peak() -> int:
    """Bytes. Where the system cannot start it anew, the peak of the whole process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used if platform.system() == "Darwin" else 1024 * used
