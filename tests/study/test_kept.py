"""What a study's results keep of its finished cells: its tables elsewhere, and how it goes on there."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_study import Done, finished_addresses

from scalabl.metrics.scores import Rows, checked
from scalabl.study.benchmark import run_benchmark, take_up, write_results
from scalabl.study.cells import PREDICTION, TRAINING, finished, is_elsewhere
from scalabl.study.kept import KEPT, keep, kept
from scalabl.study.outcomes import losses_of, outcomes, resampled, rows_of
from scalabl.study.predictions import PREDICTIONS
from scalabl.study.results import tidy
from scalabl.study.run import open_cells
from scalabl.study.work import RUN

TABLES = ("results.csv", "summary.csv", "README.md", "results.html")


@pytest.fixture
def results(done: Done, tmp_path: Path) -> Path:
    keep(done.plan, done.output, tmp_path / "results")
    return tmp_path / "results"


def test_tables_are_the_same_from_what_is_kept(done: Done, results: Path, tmp_path: Path) -> None:
    here, there, elsewhere = tmp_path / "here", tmp_path / "there", tmp_path / "elsewhere"
    for output, tables in ((done.output, here), (elsewhere, there)):
        take_up(output, results)
        write_results(done.study, done.plan, output, tables, tidy(done.study, done.plan, output), "scalabl benchmark x")
    for name in TABLES:
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert not list(elsewhere.rglob(PREDICTIONS)) and not list(elsewhere.rglob(RUN))
    # and what is kept there is what was kept here
    for path, _ in kept(results):
        assert (there / KEPT / path.name).read_bytes() == path.read_bytes()
    assert len(list(kept(there))) == len(done.plan.entries)


def test_nothing_is_left_to_do_there_and_what_an_open_cell_needs_is_done_again(
    done: Done, results: Path, tmp_path: Path
) -> None:
    output = tmp_path / "elsewhere"
    take_up(output, results)
    assert finished_addresses(done.plan, output) == set(done.plan.cells) and not open_cells(done.plan, output, "")
    entry = next(entry for entry in done.plan.entries if entry.variant.name == "scalabl mean" and entry.seeds == (1,))
    shutil.rmtree(output / "cells" / entry.prediction)
    assert [cell.address for cell in open_cells(done.plan, output, "")] == [*entry.training, entry.prediction]
    (results / KEPT / f"{entry.prediction}.safetensors").unlink()
    rows = run_benchmark(done.study, done.plan, output, results, command="")
    assert {a for a in done.plan.cells if not is_elsewhere(finished(output, a))} == {*entry.training, entry.prediction}
    assert (output / "cells" / entry.training[0] / RUN).is_dir() and len(rows) == len(done.rows)
    told = [{k: v for k, v in row.items() if "cost" not in k and k != "peak_memory"} for row in (*rows, *done.rows)]
    assert told[: len(rows)] == told[len(rows) :]  # the same machine, the same bytes


@pytest.mark.parametrize("what", ["device", "machine"])
def test_costs_are_beside_a_plain_lora_of_the_same_machine(
    done: Done, results: Path, tmp_path: Path, what: str
) -> None:
    take_up(tmp_path, results)

    def done_elsewhere(name: str, seed: int) -> dict[str, Any]:
        entry = next(e for e in done.plan.entries if e.variant.name == name and e.seeds == (seed,))
        path = tmp_path / "cells" / entry.prediction / "finished.json"
        facts: dict[str, Any] = json.loads(path.read_text()) | {what: "another"}
        path.write_text(json.dumps(facts))
        return facts

    def costs() -> dict[tuple[str, int], float | None]:
        return {(row["method"], row["seed"]): row["train_cost"] for row in tidy(done.study, done.plan, tmp_path)}

    own = done_elsewhere("scalabl", 1)
    assert {key for key, cost in costs().items() if cost is None} == {("scalabl", 1), ("scalabl+temperature", 1)}
    mle = done_elsewhere("mle", 0)  # of another seed, whose cost is the same
    assert None not in costs().values()
    assert costs()["scalabl", 1] == own["below"]["seconds"] / mle["below"]["seconds"]


def test_an_ensemble_needs_all_of_its_members_again(done: Done, results: Path, tmp_path: Path) -> None:
    take_up(tmp_path, results)
    entry = next(entry for entry in done.plan.entries if entry.variant.name == "ensemble")
    shutil.rmtree(tmp_path / "cells" / entry.prediction)
    assert {cell.address for cell in open_cells(done.plan, tmp_path, "")} == set(entry.addresses)


def test_what_is_here_is_not_replaced_and_what_is_damaged_is_left_out(
    done: Done, results: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(done.output, tmp_path / "output")
    take_up(output, results)
    assert not any(is_elsewhere(finished(output, address)) for address in done.plan.cells)
    files = sorted((results / KEPT).iterdir())
    files[0].write_bytes(files[0].read_bytes()[:200])
    files[1].rename(files[1].with_stem("0123456789abcdef"))
    content = files[2].read_bytes()
    files[2].write_bytes(re.sub(rb'(\\"seed\\": )\d', rb"\g<1>7", content))
    assert files[2].read_bytes() != content
    take_up(tmp_path / "elsewhere", results)
    lost = {path.stem for path in files[:3]}
    predictions = {a for a, cell in done.plan.cells.items() if cell.kind == PREDICTION}
    assert finished_addresses(done.plan, tmp_path / "elsewhere") & predictions == predictions - lost
    keep(done.plan, done.output, results)
    assert {path.stem for path, _ in kept(results)} == predictions


def test_kept_losses_are_half_as_precise_and_small(done: Done, results: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (4 * torch.randn(300, 5, generator=generator)).double().softmax(dim=-1)
    rows = Rows.of(*checked(probs, torch.randint(5, (300,), generator=generator)), 15)
    exact, halves = resampled(rows, 0), resampled(rows_of(losses_of(rows)), 0)
    for name, draws in exact.items():
        torch.testing.assert_close(halves[name], draws, rtol=0, atol=0.02 if name == "ece" else 1e-3)
    assert torch.equal(exact["accuracy"], halves["accuracy"])
    tensors = load_file(next((results / KEPT).iterdir()))
    assert {name.partition("|")[2] for name in tensors} == {"nll", "surprise", "brier", "right"}


def test_resamples_are_kept_beside_the_predictions_and_of_these_alone(done: Done, tmp_path: Path) -> None:
    cell = next(cell for cell in done.plan.cells.values() if cell.kind == PREDICTION)
    output = tmp_path / "output"
    shutil.copytree(done.output / "cells" / cell.address, output / "cells" / cell.address)
    first = outcomes(cell, output, "m")
    outcomes.cache_clear()
    (output / "cells" / cell.address / PREDICTIONS).unlink()
    again = outcomes(cell, output, "m")  # from what was kept
    assert [o.figures for o in first] == [o.figures for o in again]
    assert all(torch.equal(a.draws["nll"], b.draws["nll"]) for a, b in zip(first, again, strict=True))
    trained = next(cell for cell in done.plan.cells.values() if cell.kind == TRAINING)
    assert not list((done.output / "cells" / trained.address).glob("outcomes*"))
