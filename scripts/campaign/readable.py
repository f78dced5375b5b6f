"""A good one of every file that the program reads, on tiny random models, and the commands that read it.

`build` makes them all in one directory, whose place is part of some of them. docs/security.md has a line for each
`Readable`, and for what `ELSEWHERE` names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scalabl.core.errors import UserError

SHORT = "--samples 2 --predictive mc"
QUESTIONS = "--data rows --limit 4"


@dataclass(frozen=True)
class Readable:
    """Files of a kind.

    Attributes:
        line: how its line in docs/security.md begins.
        files: patterns of the files in the directory.
        commands: what reads them: a command line, or the name of a function here.
        share: of the cases, relative to the others.
    """

    line: str
    files: tuple[str, ...]
    commands: tuple[str | Callable[[], object], ...]
    share: int = 1


def read_particles() -> None:
    """What the client of a server reads before it asks."""
    from scalabl.serving.vllm import VLLMClassifier

    VLLMClassifier.from_export(Path("exported"), url="http://127.0.0.1:9")


def survey_shards() -> None:
    """What `predict --ray` reads before Ray starts."""
    from scalabl.runs.record import RunRecord
    from scalabl.serving.shard_manifest import ShardManifest, open_output, survey
    from scalabl.serving.shards import find_sources

    sources = find_sources(Path("shards"))
    wanted = ShardManifest({"sha256": RunRecord.read_classifier(Path("run")).adapter_sha256}, {"seed": 0})
    survey(Path("answered"), "jsonl", open_output(Path("answered"), wanted, Path("shards"), sources), sources, None, 2)


RUNS = ("run", "mle", "laplace", "head", "language")
READ = (
    Readable(
        "rows", ("rows/test.jsonl", "rows/validation.jsonl", "rows.parquet", "texts/t*.jsonl", "open/test.jsonl"),
        (
            f"evaluate run --data rows {SHORT} --json out/figures.json --report out/page.html",
            f"predict run --input rows/test.jsonl --output out/answers.jsonl {SHORT}",
            f"predict run --input rows.parquet --output out/answers.jsonl {SHORT}",
            f"predict run --input rows/test.jsonl --output out/answers.jsonl {SHORT} --max-error 0.9 --confidence 0.6",
            "acquire rows/test.jsonl run -k 2 --samples 2 --output out/chosen.jsonl",
            "calibrate run --data rows --samples 2",
            "evaluate language --data open --samples 2 --max-new-tokens 2 --json out/figures.json",
            "generate language --input open/test.jsonl --samples 2 --max-new-tokens 2 --json out/texts.json",
            f"predict head --input texts/test.jsonl --output out/answers.jsonl {SHORT}",
            "train --model encoder --data texts --output out/run --steps 1 --rank 2 --batch-size 2",
            "train --model base --data open --output out/run --steps 1 --rank 2 --batch-size 2",
        ), 4,
    ),
    Readable(
        "images of rows", ("pictures/images/*.png", "pictures/test.jsonl"),
        ("train --model seer --data pictures --output out/run --steps 1 --rank 2 --batch-size 2 --max-length 100",),
    ),
    Readable(
        "recipes", ("recipe.yaml", "study.yaml"),
        (
            "train --config recipe.yaml --model base --data rows --output out/run --steps 1",
            "plan --config recipe.yaml --model base --card 24GB --device cpu --json out/plan.json",
            "benchmark study.yaml --output cells --dry-run",
        ), 2,
    ),
    Readable(
        "priors and weights", ("priors.json", "weights.json"),
        (
            f"predict head --input texts/test.jsonl --output out/answers.jsonl {SHORT} --priors priors.json",
            "train --model encoder --data texts --output out/run --steps 1 --rank 2 --class-weights weights.json",
        ),
    ),
    Readable(
        "`adapter_config.json`", tuple(f"{run}/adapter_config.json" for run in (*RUNS, "stock")),
        (
            "inspect run", f"evaluate run {QUESTIONS} {SHORT}", "export run --particles 2 --output out/exported",
            "bayesianize mle --data rows --output out/made --train-rows 8", f"evaluate laplace {QUESTIONS} --samples 2",
            f"predict head --input texts/test.jsonl --output out/answers.jsonl {SHORT}",
            "predict stock --input texts/test.jsonl --output out/answers.jsonl",
            "generate language --prompt red --samples 2 --max-new-tokens 2",
        ), 4,
    ),
    Readable(
        "`adapter_model.safetensors`",
        (
            *(f"{run}/adapter_model.safetensors" for run in (*RUNS, "stock")), "run/mean/*",
            "head/features.safetensors", "laplace/joint_covariance.safetensors",
        ),
        (
            "inspect run", f"evaluate run {QUESTIONS} {SHORT}", "export run --particles 2 --output out/exported",
            f"evaluate laplace {QUESTIONS} --samples 2", "export laplace --particles 2 --output out/exported",
            "bayesianize mle --data rows --output out/made --train-rows 8",
            f"predict head --input texts/test.jsonl --output out/answers.jsonl {SHORT} --max-false-alarms 0.2",
            "predict stock --input texts/test.jsonl --output out/answers.jsonl",
            "generate language --prompt red --samples 2 --max-new-tokens 2",
        ), 4,
    ),
    Readable(
        "`scalabl.json`", (*(f"{run}/scalabl.json" for run in RUNS), "language/confidence.json"),
        (
            "inspect run", f"evaluate run {QUESTIONS} {SHORT}", "calibrate run --data rows --samples 2",
            f"predict run --input rows/test.jsonl --output out/answers.jsonl {SHORT} --max-error 0.9 --confidence 0.6",
            "export run --particles 2 --output out/exported", f"evaluate laplace {QUESTIONS} --samples 2",
            "bayesianize mle --data rows --output out/made --train-rows 8",
            f"predict head --input texts/test.jsonl --output out/answers.jsonl {SHORT} --priors priors.json",
            "generate language --prompt red --samples 2 --max-new-tokens 2 --html out/page.html",
            "train --config recipe.yaml --model base --data rows --output run --steps 4",
        ), 4,
    ),
    Readable(
        "checkpoints", ("stopped/scalabl.json", "stopped/checkpoints/*/*"),
        ("train --config recipe.yaml --model base --data rows --output stopped --steps 6 --save-steps 2",), 3,
    ),
    Readable(
        "a base model",
        (
            "base/*.json", "base/model.safetensors", "base/chat_template.jinja", "encoder/*.json",
            "encoder/model.safetensors", "seer/*.json",
        ),
        (
            f"evaluate run {QUESTIONS} {SHORT}", "plan --model base --card 24GB --device cpu",
            "plan --model seer --card 24GB --device cpu",
            "train --model base --data rows --output out/run --steps 1 --rank 2 --batch-size 2 --chat",
            "train --model encoder --data texts --output out/run --steps 1 --rank 2 --batch-size 2",
            "generate language --prompt red --samples 2 --max-new-tokens 2 --chat",
        ), 3,
    ),
    Readable(
        "entailment and embedding models", ("judge/*",),
        (
            "generate run --prompt red --answers 3 --equivalence entailment:judge --samples 2 --max-new-tokens 3",
            "generate run --prompt red --answers 3 --equivalence embedding:judge --samples 2 --max-new-tokens 3",
        ),
    ),
    Readable(
        "cells of a study", ("cells/cells/*/*", "cells/cells/*/run/*", "cells/cells/*/posthoc/*/*", "results/*"),
        (
            "benchmark study.yaml --output cells --results results --tables-only",
            "benchmark study.yaml --output cells --results results",
            "benchmark study.yaml --output cells --dry-run",
        ), 3,
    ),
    Readable("exported particles", ("exported/particles/manifest.json", "exported/particles/*/*"), (
        read_particles, "export run --particles 2 --output exported",
    )),
    Readable("unfinished answers", ("out/.answers.jsonl.*",), (
        f"predict run --input rows/test.jsonl --output out/answers.jsonl {SHORT}",
    )),
    Readable("shards and their answers", ("shards/*", "answered/*"), (survey_shards,)),
    Readable("the cache", ("cache/tasks/*/*", "cache/trunks/*"), (
        f"evaluate run --data sciq --limit 4 {SHORT}", "data get sciq",
        "train --model base --data rows --output out/run --steps 1 --rank 2 --layers last:1",
    )),
)  # fmt: skip
ELSEWHERE = {
    "a chat template": "with the base model",
    "answers of a vLLM server": "tests/serving/test_http_client.py",
    "requests over HTTP": "scripts/campaign/soak.py",
    "a Ray cluster": "trusted",
    "the wheel of benchmarks": "tests/data/test_wheel.py",
    "benchmarks on the Hub": "tests/data/test_hub.py",
    "modules in the current directory": "tests/core/test_interpreters.py",
}  # lines of docs/security.md whose files are not damaged here, and where they are


def build(place: Path) -> None:
    """Make everything; the current directory has to be `place`.

    Raises:
        RuntimeError: a command that is to make a file does not.
    """
    from parts import here

    _models(place)
    _rows(place)

    def run(command: str, code: int = 0) -> None:
        said = here(command.split(), limit=300)
        if said.code != code:
            raise RuntimeError(f"{command}: {said.code}\n{said.out}\n{said.err}")

    recipe = {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "layers": "last:2", "learning_rate": "5e-2",
        "batch_size": 4, "posterior": {"beta": 1.0, "stochastic_layers": "last:1"},
        "rows": {"scoring": "letters", "max_length": 64, "validation_rows": 24}, "dtype": "float32",
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    study = {
        "model": "base", "tasks": ["rows"], "methods": ["mle", "temperature", "tfb", "laplace", "scalabl"],
        "seeds": [0], "samples": 2, "test_rows": 6, "validation_rows": 20, "settings": {"steps": 1, "r": 2},
        "results": "results",
    }  # fmt: skip
    Path("study.yaml").write_text("# Which is best?\n" + yaml.safe_dump(study), encoding="utf-8")
    train = "train --config recipe.yaml --model base --data rows --steps 4 --output"
    run(f"{train} run")
    run(f"{train} mle --method mle")
    run("bayesianize mle --data rows --output laplace --train-rows 8")
    run("train --model encoder --data texts --output head --steps 4 --rank 4 --class-weights weights.json")
    run("train --model encoder --data texts --output stock --steps 2 --rank 4 --method mle")
    (Path("stock") / "scalabl.json").unlink()
    named = {str(i): name for i, name in enumerate(json.loads(Path("weights.json").read_text(encoding="utf-8")))}
    Path("stock", "config.json").write_text(json.dumps({"id2label": named}), encoding="utf-8")
    run("train --model base --data open --output language --steps 2 --rank 4")
    with _changed("scalabl.generation.evaluation", "fit_on", _fitted):  # tiny models are never right
        run("evaluate language --data open --samples 2 --max-new-tokens 2")
    run("export run --particles 2 --output exported")
    run("benchmark study.yaml --output cells --results results")
    next(
        path
        for path in Path("cells/cells").glob("*/finished.json")
        if "predictions" in str(list(path.parent.iterdir()))
    ).unlink()
    Path("results/answer.md").write_text("By hand.\n", encoding="utf-8")
    _stopped(run)
    Path("out").mkdir()
    with _changed("scalabl.inference.batch_prediction", "_finish", _stop):
        run(f"predict run --input rows/test.jsonl --output out/answers.jsonl {SHORT}", code=2)
    _shards()
    for directory in (*RUNS, "stopped", "results", "cells", "out", "exported/particles", "rows"):
        Path(directory, "notes.txt").write_text("The user's own.\n", encoding="utf-8")


def _models(place: Path) -> None:
    from chat_base import PLAIN, chat_base
    from precision.image_text import image_text_base
    from tiny_base import tiny_encoder, tiny_tokenizer
    from transformers import BertConfig, BertForSequenceClassification

    chat_base(place / "base", PLAIN)
    shutil.copytree(tiny_encoder(), place / "encoder")
    shutil.copytree(image_text_base("qwen2_5_vl"), place / "seer")
    names = ("contradiction", "neutral", "entailment")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=310, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}, **small
    )
    BertForSequenceClassification(config).save_pretrained(place / "judge")
    tiny_tokenizer().save_pretrained(place / "judge")


def _rows(place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from precision.image_text import write_image_task
    from tiny_base import as_json, questions, write_jsonl, write_task, write_texts

    from scalabl.data.open_questions import OpenQuestion, OpenTask
    from scalabl.data.store import task_folder
    from scalabl.data.store import write_task as keep

    write_task(place / "rows", validation=24, test=8)
    pq.write_table(pa.Table.from_pylist([as_json(row) for row in questions(6)]), place / "rows.parquet")
    write_texts(place / "texts", validation=24, test=6)
    labels = [f"about {word}" for word in ("red", "blue", "green")]
    for name, value in (("priors", 1 / 3), ("weights", 1.0)):
        (place / f"{name}.json").write_text(json.dumps(dict.fromkeys(sorted(labels), value)), encoding="utf-8")
    for split, number in (("train", 8), ("validation", 6), ("test", 4)):
        rows = [{"question": f"Which is {split} {i}?", "answers": ["red", "the red one"]} for i in range(number)]
        write_jsonl(place / "open" / f"{split}.jsonl", rows)
    write_image_task(place / "pictures", train=4, validation=0, test=2)
    open_rows = tuple(OpenQuestion(f"v-{i}", f"Which is {i}?", ("red",)) for i in range(4))
    task = OpenTask("sciq", {"train": open_rows, "validation": open_rows, "test": open_rows}, None, "made", "none")
    keep(task, task_folder(place / "cache", "sciq"))


def _fitted(_answers: Any) -> Any:
    from scalabl.generation.confidence import fit_confidence

    return fit_confidence(
        {"mean_entropy": [3.0, 2.0, 1.0, 0.5] * 10}, [False, False, True, True] * 10, {"mean_entropy": True}
    )


def _stop(*_: Any) -> None:
    raise UserError("Stopped here.")


@contextmanager
def _changed(module: str, name: str, value: Any) -> Any:
    import importlib

    of = importlib.import_module(module)
    before = getattr(of, name)
    setattr(of, name, value)
    try:
        yield
    finally:
        setattr(of, name, before)


def _stopped(run: Callable[..., None]) -> None:
    """A run of six steps that was killed behind its fourth, with two checkpoints."""
    from scalabl.training import run as training

    kept = training.TrainingArguments
    with (
        _changed("scalabl.training.run", "remove_checkpoints", lambda _output: None),
        _changed("scalabl.training.run", "TrainingArguments", lambda **given: kept(**given | {"save_total_limit": 9})),
    ):
        run("train --config recipe.yaml --model base --data rows --output stopped --steps 6 --save-steps 2")
    for path in Path("stopped").iterdir():
        if path.name == "scalabl.json":
            record = json.loads(path.read_text(encoding="utf-8"))
            gone = ("adapter_sha256", "config_sha256", "calibration", "features_sha256")
            kept_fields = {name: value for name, value in record.items() if name not in gone} | {"status": "running"}
            path.write_text(json.dumps(kept_fields), encoding="utf-8")
        elif path.name != "checkpoints":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree("stopped/checkpoints/checkpoint-6")


def _shards() -> None:
    from scalabl.runs.record import RunRecord
    from scalabl.serving.shard_manifest import ShardManifest

    Path("shards").mkdir()
    shutil.copy("rows/test.jsonl", "shards/a.jsonl")
    shutil.copy("rows.parquet", "shards/b.parquet")
    Path("answered").mkdir()
    ShardManifest({"sha256": RunRecord.read_classifier(Path("run")).adapter_sha256}, {"seed": 0}).write(
        Path("answered")
    )


def forged(place: Path, changed: Path) -> None:
    """After a file of a run was changed, put the digests of what is there now into its record, as a forger would."""
    from scalabl.core.files import read_if_whole, sha256
    from scalabl.runs.record import config_digest

    digests = {
        "adapter_model.safetensors": "adapter_sha256", "joint_covariance.safetensors": "joint_sha256",
        "features.safetensors": "features_sha256", "predictions.safetensors": "sha256",
    }  # fmt: skip
    name = "finished.json" if changed.name == "predictions.safetensors" else "scalabl.json"
    path = changed.parent / name
    if not path.is_file() or not changed.is_file():
        return
    record = read_if_whole(path)
    if not isinstance(record, dict):
        return
    if changed.name in digests:
        record[digests[changed.name]] = sha256(changed)
    elif changed.name == "adapter_config.json" and "config_sha256" in record:
        try:
            record["config_sha256"] = config_digest(changed.parent)
        except UserError:
            return
    path.write_text(json.dumps(record), encoding="utf-8")


def lines() -> Sequence[str]:
    """How the lines of docs/security.md begin."""
    return [*(each.line for each in READ), *ELSEWHERE]
