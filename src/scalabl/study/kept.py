"""What a study's results keep of its finished cells, so that it goes on, and its tables are made anew, on any machine.

RESULTS/finished/ADDRESS.safetensors    of a prediction cell: its outcomes without their resamples (the losses of its
                                        rows, its figures), and what it and the cells below it measured

A cell of another machine counts as finished. Where an open cell needs what it made, it is done again. Reading what is
kept imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from scalabl.core.files import write_bytes, write_json
from scalabl.study.cells import ELSEWHERE, OUTCOMES, address_of, below_of, finished, outcome_facts, place_of
from scalabl.study.plan import StudyPlan

KEPT = "finished"


def keep(plan: StudyPlan, output: Path, results: Path) -> None:
    """Write down what the finished entries of a plan came to, where that is not there already."""
    from scalabl.study.outcomes import outcomes, write_outcomes

    known = {path: chain[path.stem]["finished"]["sha256"] for path, chain in kept(results)}
    for entry in plan.entries:
        done = {address: finished(output, address) for address in entry.addresses}
        predicted = done[entry.prediction]
        if predicted is None or None in done.values():
            continue
        path = results / KEPT / f"{entry.prediction}.safetensors"
        if known.get(path) == predicted["sha256"]:
            continue
        chain = {a: {"settings": plan.cells[a].as_dict(), "finished": _here(facts)} for a, facts in done.items()}
        bare = [replace(each, draws={}) for each in outcomes(plan.cells[entry.prediction], output, "")]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_outcomes(path, bare, predicted["sha256"], cells=chain)


def kept(results: Path) -> Iterator[tuple[Path, dict[str, dict[str, Any]]]]:
    """The files that results keep, with the cells in each: address -> {"settings", "finished"}. A file that cannot be
    read, is of another format or not of the cell that it is named after is left out: its cells are done again."""
    for path in sorted((results / KEPT).glob("*.safetensors")):
        facts = outcome_facts(path)
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            chain: dict[str, dict[str, Any]] = facts["cells"]
            whole = facts["of"] == chain[path.stem]["finished"]["sha256"]
            if whole and all(address_of(cell["settings"]) == address for address, cell in chain.items()):
                yield path, chain


def restore(output: Path, results: Path) -> None:
    """Enter the cells that results keep among the finished ones of `output`, where they are not there themselves."""
    for path, chain in kept(results):
        for address, cell in chain.items():
            if finished(output, address) is not None:
                continue
            directory = output / "cells" / address
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / "settings.json", cell["settings"])
            if address == path.stem:
                write_bytes(directory / OUTCOMES, path.read_bytes())
            facts = {**cell["finished"], ELSEWHERE: True}
            if address == path.stem and "below" not in facts:  # older files say it of each cell alone
                facts |= below_of([each["finished"] for a, each in chain.items() if a != address], place_of(facts))
            write_json(directory / "finished.json", facts)


def _here(facts: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (facts or {}).items() if name != ELSEWHERE}
