"""`scalabl acquire`: which rows it picks, in which form, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from program import Program
from tiny_base import as_json, questions, write_jsonl

from scalabl.core.errors import UserError
from scalabl.data import load_rows
from scalabl.inference.acquisition import acquire, informativeness, most_informative, random_order
from scalabl.inference.predictor import log_probabilities
from scalabl.metrics.uncertainty import average, decompose
from scalabl.runs.loading import load_run


def picked(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Fifteen rows without answers or ids, one of them with a key's own order and letters beyond ASCII."""
    rows = [{k: v for k, v in as_json(row).items() if k not in ("answer", "id")} for row in questions(15, seed=8)]
    rows[4] = {"choices": rows[4]["choices"], "question": "größer?"}
    return write_jsonl(tmp_path / "pool.jsonl", rows)


@pytest.mark.parametrize("by", ["bald", "entropy", "margin"])
def test_the_most_uncertain_rows_come_first(program: Program, scalabl_run: Path, pool: Path, by: str) -> None:
    said = program("acquire", pool, scalabl_run, "-k", 6, "--by", by, "--samples", 4, "--seed", 3)
    assert (said.code, said.err) == (0, "")
    found = picked(said.out)
    unnamed = program("acquire", pool, scalabl_run, "-k", 6, "--samples", 4, "--seed", 3).out
    assert (unnamed == said.out) == (by == "margin")  # the default
    run, rows = load_run(scalabl_run), load_rows(pool, require_answer=False)
    log_probs = log_probabilities(run, rows, run.predictive(samples=4, seed=3))
    parts, probs = decompose(log_probs), average(log_probs).sort(dim=1).values
    scores = {"bald": parts.epistemic, "entropy": parts.total, "margin": probs[:, -2] - probs[:, -1]}[by].tolist()
    places = sorted(range(15), key=lambda i: -scores[i])[:6]
    originals = picked(pool.read_text(encoding="utf-8"))
    assert found == [originals[i] | {"score": scores[i]} for i in places]
    assert all(list(row) == [*originals[i], "score"] for row, i in zip(found, places, strict=True))
    assert found[0]["score"] > found[-1]["score"]


def test_bald_and_entropy_differ_and_answers_do_not_matter(
    program: Program, scalabl_run: Path, pool: Path, tmp_path: Path
) -> None:
    first, labelled, entropy = tmp_path / "first.jsonl", tmp_path / "labelled.jsonl", tmp_path / "entropy.jsonl"
    assert program("acquire", pool, scalabl_run, "-k", 15, "--output", first).out == ""
    rows = [row | {"answer": i % 2} for i, row in enumerate(picked(pool.read_text(encoding="utf-8")))]
    program("acquire", write_jsonl(tmp_path / "l.jsonl", rows), scalabl_run, "-k", 15, "--output", labelled)
    program("acquire", pool, scalabl_run, "-k", 15, "--by", "entropy", "--output", entropy)
    orders = [[row["question"] for row in picked(file.read_text("utf-8"))] for file in (first, labelled, entropy)]
    assert orders[0] == orders[1] != orders[2]
    assert {row["answer"] for row in picked(labelled.read_text("utf-8"))} == {0, 1}
    assert not list(tmp_path.glob(".*"))


def test_random_is_the_seeds_own_order(program: Program, scalabl_run: Path, mle_run: Path, pool: Path) -> None:
    arguments = ("acquire", pool, scalabl_run, "-k", 15, "--by", "random", "--seed")
    one, again, other = (program(*arguments, seed).out for seed in (0, 0, 1))
    assert one == again != other
    assert sorted(row["question"] for row in picked(one)) == sorted(row["question"] for row in picked(other))
    scores = [row["score"] for row in picked(one)]
    assert scores == sorted(scores, reverse=True) == sorted(random_order(15, 0).tolist(), reverse=True)
    # the run has no part in it
    assert program("acquire", pool, mle_run, "-k", 15, "--by", "random").out == one


def test_what_was_picked_can_be_labelled_and_read(program: Program, scalabl_run: Path, pool: Path) -> None:
    output = pool.with_name("picked.jsonl")
    program("acquire", pool, scalabl_run, "-k", 4, "--output", output)
    rows = [row | {"answer": 1} for row in picked(output.read_text("utf-8"))]
    assert [row.answer for row in load_rows(write_jsonl(output, rows))] == [1] * 4
    # and ranked again, by its new score
    again = picked(program("acquire", output, scalabl_run, "-k", 4).out)
    assert [row["score"] for row in again] == pytest.approx([row["score"] for row in rows], rel=1e-4)


def test_a_run_without_particles_ranks_by_its_probabilities_alone(program: Program, mle_run: Path, pool: Path) -> None:
    for by in (("--by", "entropy"), ("--by", "margin"), ()):
        assert len(picked(program("acquire", pool, mle_run, "-k", 3, *by).out)) == 3
    assert "use --by margin" in program("acquire", pool, mle_run, "-k", 3, "--by", "bald").sentence()
    with pytest.raises(UserError, match="no epistemic part"):
        acquire(mle_run, load_rows(pool, require_answer=False), 3, by="bald")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-k", 0), "-k is 0; it must be between 1 and the 15 rows"),
        (("-k", 16), "-k is 16; it must be between 1 and the 15 rows"),
        ((), "Missing option '-k'"),
        (("-k", 3, "--by", "size"), "--by is 'size'; it must be one of margin, bald, entropy, random"),
        (("-k", 3, "--by", "bald", "--samples", 1), "use --by margin"),
        (("-k", 3, "--samples", 0), "--samples is 0"),
        (("-k", 3, "--output", "/nowhere/picked.jsonl"), "cannot be written"),
    ],
)
def test_bad_settings(
    program: Program, scalabl_run: Path, pool: Path, options: tuple[object, ...], message: str
) -> None:
    before = set(pool.parent.iterdir())
    assert message in program("acquire", pool, scalabl_run, *options).sentence()
    assert set(pool.parent.iterdir()) == before
    assert "There is no run directory" in program("acquire", pool, pool.parent / "x", "-k", 1).sentence()
    assert "does not exist" in program("acquire", pool.parent / "x.jsonl", scalabl_run, "-k", 1).sentence()


def test_ties_are_taken_in_their_order() -> None:
    import torch

    assert most_informative(torch.tensor([0.0, 2.0, 1.0, 2.0]), 3) == [1, 3, 2]
    with pytest.raises(UserError, match="k is 5"):
        most_informative(torch.zeros(4), 5)
    with pytest.raises(UserError, match="margin, bald or entropy"):
        informativeness(torch.zeros(2, 1, 1), "random")
