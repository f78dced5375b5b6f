"""What a command writes: never over what it reads, whatever its options, and never over files that are not its own."""

import inspect
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from program import Program, train_arguments
from tiny_base import as_json, questions, tiny_base, write_jsonl, write_task

from scalabl.cli.main import app
from scalabl.core.errors import UserError
from scalabl.core.outputs import require_writable
from scalabl.study.benchmark import run_benchmark
from scalabl.study.plan import make_plan
from scalabl.study.study import read_study
from scalabl.training.posthoc.settings import require_free

OUTPUTS = {"json", "html", "report", "output", "results"}
INPUTS = {"run", "runs", "adapter", "data", "ood", "calibrate", "input", "pool", "priors", "config", "model", "recipe"}
# texts that name no file, and `equivalence`, which may end in a model's directory
TEXTS = {
    "abstain", "bound", "by", "card", "covariance", "device", "draws", "dtype", "equivalence", "format", "guarantee",
    "host", "kl", "kl_normalization", "labels", "layers", "loss", "measure", "method", "name", "names", "normalization",
    "oos_score", "optimizer", "predictive", "prompt", "quantization", "ray", "schedule", "score", "scoring",
    "set_score", "split", "stochastic_layers", "stochastic_modules", "stop", "structure", "target_modules", "task",
    "class_weights", "template",
}  # fmt: skip


def commands() -> Iterator[tuple[str, Any]]:
    """Each command by its name, those of `data` too."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        yield from (getattr(command, "commands", None) or {name: command}).items()


def walked(annotation: Any) -> Iterator[Any]:
    """The types that an annotation names."""
    yield annotation
    for inner in get_args(annotation):
        yield from walked(inner) if not isinstance(inner, str) else ()


def test_every_option_is_known_as_an_output_an_input_or_neither() -> None:
    unknown = {
        f"{name} --{parameter.name}"
        for name, command in commands()
        for parameter in inspect.signature(command.callback, eval_str=True).parameters.values()
        if {str, Path} & set(walked(parameter.annotation)) and parameter.name not in OUTPUTS | INPUTS | TEXTS
    }
    assert not unknown


# what a command takes beside the options that are tried, with files that are there
REQUIRED: dict[str, tuple[str, ...]] = {
    "acquire": ("{pool}", "{run}", "-k", "2", "--by", "random"),
    "bayesianize": ("{adapter}", "--data", "{data}", "--output", "{new}"),
    "calibrate": ("{run}", "--data", "{data}"),
    "evaluate": ("{run}", "--data", "{data}"),
    "generate": ("{run}", "--input", "{input}"),
    "inspect": ("{run}",),
    "plan": ("--model", "{model}"),
    "predict": ("{run}", "--input", "{input}", "--output", "{new}"),
    "train": ("--model", "{model}", "--data", "{data}", "--output", "{new}", "--steps", "1"),
}
# outputs that are directories, each refused where it is not empty by rules of its own; demo reads nothing
DIRECTORIES = {
    ("bayesianize", "output"), ("benchmark", "output"), ("benchmark", "results"), ("demo", "json"), ("demo", "output"),
    ("demo", "report"), ("export", "output"), ("train", "output"),
}  # fmt: skip
PAIRS = [
    (name, written.name, read.name)
    for name, command in commands()
    for written in command.params
    if written.name in OUTPUTS and (name, written.name) not in DIRECTORIES
    for read in command.params
    if read.name in INPUTS and not (name == "inspect" and read.name == "model")  # of --variance alone
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, scalabl_run: Path, mle_run: Path) -> dict[str, Path]:
    """A file or a directory for each input."""
    root = tmp_path_factory.mktemp("places")
    labelled = [as_json(row) for row in questions(20)]
    found = {
        name: write_jsonl(root / f"{name}.jsonl", labelled) for name in ("data", "ood", "calibrate", "pool", "input")
    }
    for name, source in (("run", scalabl_run), ("adapter", mle_run), ("model", tiny_base())):
        shutil.copytree(source, root / name)
        found[name] = root / name
    found["config"] = root / "recipe.yaml"
    found["config"].write_text(f"model: {found['model']}\ndata: {found['data']}\n", encoding="utf-8")
    found["priors"] = root / "priors.json"
    found["priors"].write_text('{"a": 1}', encoding="utf-8")
    return found | {"new": root / "new"}


@pytest.mark.parametrize(("command", "written", "read"), PAIRS)
def test_no_command_writes_over_what_it_reads(
    program: Program, places: dict[str, Path], command: str, written: str, read: str
) -> None:
    place = places[read]
    file = next(path for path in sorted(place.iterdir()) if path.is_file()) if place.is_dir() else place
    before = file.read_bytes()
    given = [text.format_map(places) for text in REQUIRED[command]]
    if written == "output":
        given = given[: given.index("--output")] if "--output" in given else given
    if read not in ("run", "adapter", "pool") and f"--{read}" not in given:
        given += [f"--{read}", str(place)]
    said = program(command, *given, f"--{written}", file).sentence()
    # these runs have no labels, so no priors either
    assert "overwritten" in said or "overwrite the other" in said or (read == "priors" and "--priors is of" in said)
    assert file.read_bytes() == before


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_what_is_read_are_followed(places: dict[str, Path], tmp_path: Path, link: Any) -> None:
    for name, inside in (("data", ""), ("run", "mean/adapter_config.json"), ("model", "config.json")):
        link(places[name] / inside, tmp_path / name)
        with pytest.raises(UserError, match="overwrit"):
            require_writable(tmp_path / name, reads=(places[name],))


def test_data_of_a_recipe_is_read_too(program: Program, places: dict[str, Path]) -> None:
    said = program("train", "--config", places["config"], "--output", places["new"], "--json", places["data"])
    assert "overwrite the other" in said.sentence()


def test_what_earlier_calls_wrote_of_a_run_is_written_again(tmp_path: Path, scalabl_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scalabl_run, run)
    for name in ("figures.json", "report.html", "answers.jsonl"):
        (run / name).touch()
        require_writable(run / name, reads=(run,))
    for name in ("scalabl.json", "adapter_config.json", "README.md", "mean/adapter_config.json"):
        with pytest.raises(UserError, match="which is read, and would be overwritten; choose another file"):
            require_writable(run / name, reads=(run,))
    with pytest.raises(UserError, match="which is read"):  # it would be taken for the run's own
        require_writable(run / "confidence.json", reads=(run,))
    with pytest.raises(UserError, match="is a file of a run or of a model"):
        require_writable(run / "adapter_model.safetensors")
    rows = write_task(tmp_path / "task")
    with pytest.raises(UserError, match="which is read"):
        require_writable(rows / "test.jsonl", reads=(rows,))
    (rows / "figures.json").touch()
    require_writable(rows / "figures.json", reads=(rows, "arc-easy", None, "s3://bucket/rows"))


def test_links_to_nowhere_and_devices_are_no_places(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "x")
    with pytest.raises(UserError, match="is a link to nowhere; remove it, or choose another file"):
        require_writable(tmp_path / "link")
    with pytest.raises(UserError, match="cannot be written"):
        require_writable(Path(os.devnull))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    require_writable(tmp_path / "new", reads=(tmp_path / "circle",))  # whoever reads it says that it is not there
    with pytest.raises(UserError, match="is a link to nowhere"):
        require_writable(tmp_path / "circle")
    with pytest.raises(UserError, match="link is a link to nowhere; remove it, or choose another --output"):
        require_free(tmp_path / "link")


@pytest.mark.parametrize("name", ["README.md", "results.csv"])
def test_a_study_does_not_write_over_files_that_are_not_its_own(program: Program, tmp_path: Path, name: str) -> None:
    task, results = write_task(tmp_path / "task"), tmp_path / "project"
    results.mkdir()
    (results / name).write_text("mine", encoding="utf-8")
    recipe = tmp_path / "study.yaml"
    recipe.write_text(
        f"name: s\nmodel: {tiny_base()}\ntasks: [{task}]\nmethods: [mle]\nsettings: {{steps: 1}}\nresults: {results}\n",
        encoding="utf-8",
    )
    said = program("benchmark", recipe, "--output", tmp_path / "cells").sentence()
    assert f"{results / name} is not of a study, and would be overwritten; choose another --results" in said
    study = read_study(recipe)
    with pytest.raises(UserError, match="is not of a study, and would be overwritten"):
        run_benchmark(study, make_plan(study), tmp_path / "cells", results, command="")
    assert (results / name).read_text(encoding="utf-8") == "mine" and not (tmp_path / "cells").exists()


def test_a_run_s_record_is_not_its_figures(program: Program, scalabl_run: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scalabl_run, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("scalabl.json", "adapter_model.safetensors"):
        for option in ("--json", "--report"):
            assert "overwritten" in program("evaluate", run, "--data", rows, option, run / name).sentence()
        assert "overwritten" in program("predict", run, "--input", rows, "--output", run / name).sentence()
        assert "overwritten" in program(*train_arguments(rows, tmp_path / "x", "--json", run / name)).sentence()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
