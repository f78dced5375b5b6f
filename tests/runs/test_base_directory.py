"""A run on a base model that was named by a relative path."""

from pathlib import Path

import pytest
from short_run import settings_of
from tiny_base import tiny_base

from scalabl.core.errors import UserError
from scalabl.inference.classifier import Classifier
from scalabl.runs.directory import claim
from scalabl.runs.record import RunRecord
from scalabl.training.run import train


def test_a_run_finds_its_base_from_anywhere_and_is_the_same_run_by_any_path(
    tmp_path: Path, task_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run = tiny_base(), tmp_path / "run"
    monkeypatch.chdir(base.parent)
    settings = settings_of(Path(base.name), task_directory, steps=1)
    assert not Path(settings.model).is_absolute()
    train(settings, run)
    assert RunRecord.read(run).model == str(base)
    assert claim(run, settings) and claim(run, settings.changed(model=str(base)))  # finished
    row = {"question": "Which?", "choices": ["red", "blue"]}
    monkeypatch.chdir(tmp_path)
    expected = Classifier.from_pretrained(run, samples=2)(row).probs
    # an older record has the path as it was given: found by the run's parents, or from where it was given
    record = RunRecord.read(run)
    older = RunRecord(**record.as_dict() | {"recipe": record.recipe | {"model": base.name}})
    older.write(run)
    with pytest.raises(UserError, match="model was .*, now"):
        claim(run, settings.changed(model="owner/other"))
    monkeypatch.chdir(base.parent)
    assert claim(run, settings)
    assert (Classifier.from_pretrained(run, samples=2)(row).probs == expected).all()
    monkeypatch.chdir("/")
    (tmp_path / base.name).symlink_to(base)
    assert (Classifier.from_pretrained(run, samples=2)(row).probs == expected).all()
    (tmp_path / base.name).unlink()
    RunRecord(**record.as_dict() | {"recipe": record.recipe | {"model": "./gone"}}).write(run)
    with pytest.raises(UserError, match=r"The base model of .*run was in ./gone, which is not there; .* --model"):
        Classifier.from_pretrained(run)
