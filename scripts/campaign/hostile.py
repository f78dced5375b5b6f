"""Hostile inputs: each is refused with exit code 2 and one sentence, or worked through; no traceback, no hang.

Inputs come from grammars of our own formats (scripts/campaign/grammars.py): JSONL rows of every kind, recipes of runs
and of studies, records, adapters' configurations, headers of safetensors files, directories of shards. The program runs
in this process, so that torch is imported once; every so often the same call is made in a process of its own and has
to end alike. Results: docs/results/campaign/hostile.json and .md.

    python scripts/campaign/hostile.py --inputs 1000
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis.configuration import set_hypothesis_home_dir
from parts import LIMIT, Said, apart, here, offline, tiny_run, tree, write

from harness import options, table  # isort: skip

CHOICES = [
    {"id": "q1", "question": "Which is wet?", "choices": ["water", "fire", "stone"], "answer": "water"},
    {"id": "q2", "question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1},
    {"question": "Which is red?", "choices": ["red", "blue", "green", "a long answer"], "answer": "A", "score": 0.5},
    {"question": "And a fourth?", "choices": ["yes", "no"], "answer": "no"},
]  # fmt: skip
LABELS = [{"text": f"text {i}", "label": ("yes", "no")[i % 2]} for i in range(6)]
TEXTS = [{"prompt": f"Question {i}?", "completion": " an answer"} for i in range(4)]
TALKS = [
    {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(4)
]
OPEN = [{"question": f"Which is {i}?", "answers": ["red", "the red one"]} for i in range(4)]
RECIPE: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "learning_rate": "1e-3", "batch_size": 2,
    "posterior": {"beta": 1.0, "prior_std": 1.0, "schedule": "elbo", "stochastic_layers": "last:1"},
    "rows": {"scoring": "letters", "max_length": 64, "validation_rows": 4}, "seed": 1, "dtype": "float32",
}  # fmt: skip
STUDY: dict[str, Any] = {
    "name": "mine", "tasks": ["task"], "methods": ["mle", {"method": "scalabl", "grid": {"r": [2, 4]}}],
    "seeds": [0, 1], "samples": 2, "test_rows": 4, "shift": {}, "settings": {"steps": 1, "r": 4},
    "method_settings": {"mle": {"weight_decay": 0.01}}, "predict_batch_size": 4,
}  # fmt: skip
SHORT, TWO_TOKENS = ("--samples", 2), ("--max-new-tokens", 2)


@dataclass(frozen=True)
class Places:
    """What the inputs are for: finished runs, the rows and the model that they were trained on."""

    run: Path
    plain: Path
    task: Path
    base: Path
    chat: Path  # with a chat template


Build = Callable[[Places, Path, bytes, int], list[Any]]


def _rows(name: str) -> Build:
    """The rows in a file, and one of the commands that read them."""

    def build(places: Places, directory: Path, data: bytes, which: int) -> list[Any]:
        rows = directory / "rows.jsonl"
        rows.write_bytes(data)
        commands: dict[str, list[list[Any]]] = {
            "choices": [
                ["predict", places.run, "--input", rows, "--output", directory / "answers.jsonl", *SHORT],
                ["evaluate", places.run, "--data", rows, "--json", directory / "figures.json", *SHORT],
                ["acquire", rows, places.run, "-k", 1, "--output", directory / "chosen.jsonl", *SHORT],
                ["bayesianize", places.plain, "--data", rows, "--output", directory / "made"],
            ],
            "open": [
                ["generate", places.run, "--input", rows, *TWO_TOKENS, "--json", directory / "a.json", *SHORT],
                ["evaluate", places.run, "--data", rows, *TWO_TOKENS, *SHORT],
            ],
        }  # fmt: skip
        model = places.chat if name == "talks" else places.base
        train = ["train", "--model", model, "--data", rows, "--output", directory / "run", "--steps", 1]
        chosen = commands.get(name, [[*train, "--rank", 2, "--batch-size", 2]])
        return chosen[which % len(chosen)]

    return build


def _recipe(places: Places, directory: Path, data: bytes, which: int) -> list[Any]:
    recipe = directory / "recipe.yaml"
    recipe.write_bytes(data)
    if which % 2:
        return ["plan", "--config", recipe, "--model", places.base, "--card", "24GB", "--device", "cpu"]
    given = ["--model", places.base, "--data", places.task, "--steps", 1]
    return ["train", "--config", recipe, *given, "--output", directory / "run"]


def _study(places: Places, directory: Path, data: bytes, which: int) -> list[Any]:
    recipe = directory / "study.yaml"
    data = data.replace(b"- task\n", f"- {places.task}\n".encode())
    recipe.write_bytes(data if b"model:" in data else f"model: {places.base}\n".encode() + data)
    return ["benchmark", recipe, "--output", directory / "cells", "--dry-run"]


def _altered(name: str, method: str = "run") -> Build:
    """A run with one file altered, and one of the commands that read a run."""

    def build(places: Places, directory: Path, data: bytes, which: int) -> list[Any]:
        from scalabl.core.files import ADAPTER, sha256

        run = directory / "run"
        shutil.copytree(getattr(places, method), run)
        (run / name).write_bytes(data)
        if name == ADAPTER:  # past the comparison with the record
            record = json.loads((run / "scalabl.json").read_text(encoding="utf-8"))
            record["adapter_sha256"] = sha256(run / ADAPTER)
            (run / "scalabl.json").write_text(json.dumps(record), encoding="utf-8")
        rows = places.task / "test.jsonl"
        commands: list[list[Any]] = [
            ["inspect", run],
            ["evaluate", run, "--data", rows, "--limit", 4, *SHORT],
            ["predict", run, "--input", rows, "--output", directory / "answers.jsonl", *SHORT],
            ["generate", run, "--prompt", "red", "--max-new-tokens", 2, *SHORT],
            ["export", run, "--particles", 2, "--output", directory / "exported"],
            ["bayesianize", run, "--data", places.task, "--output", directory / "made"],
        ]
        return commands[5 if method == "plain" else which % 5]

    return build


KINDS: dict[str, tuple[str, Any, Build]] = {
    "rows: choices": ("jsonl", CHOICES, _rows("choices")),
    "rows: labels": ("jsonl", LABELS, _rows("labels")),
    "rows: texts": ("jsonl", TEXTS, _rows("texts")),
    "rows: conversations": ("jsonl", TALKS, _rows("talks")),
    "rows: open questions": ("jsonl", OPEN, _rows("open")),
    "recipe of a run": ("yaml", RECIPE, _recipe),
    "recipe of a study": ("yaml", STUDY, _study),
    "record": ("json", "run/scalabl.json", _altered("scalabl.json")),
    "adapter's configuration": ("json", "run/adapter_config.json", _altered("adapter_config.json")),
    "plain LoRA's configuration": ("json", "plain/adapter_config.json", _altered("adapter_config.json", "plain")),
    "header of safetensors": ("safetensors", "run/adapter_model.safetensors", _altered("adapter_model.safetensors")),
    "directory of shards": ("jsonl", CHOICES, _rows("choices")),
}


def examined_shards(places: Places, directory: Path, data: bytes, which: int) -> Said:
    """What `scalabl predict --ray` reads before it starts Ray: the shards of a directory, and its output's manifest."""
    from scalabl.core.errors import UserError
    from scalabl.runs.record import RunRecord
    from scalabl.serving.shard_manifest import MANIFEST, ShardManifest, open_output, survey
    from scalabl.serving.shards import find_sources

    shards, output = directory / "shards", directory / "answers"
    names = ("a.jsonl", "b/c.jsonl", ".hidden.jsonl", "a.parquet", "é\n.jsonl", "empty/.jsonl")
    for name in {names[which % 6], names[which // 6 % 6], "z.jsonl"}:
        (shards / name).parent.mkdir(parents=True, exist_ok=True)
        (shards / name).write_bytes(data)
    if which % 5 == 0:
        output.mkdir()
        (output / MANIFEST).write_bytes(data)
    try:
        sources = find_sources(shards)
        wanted = ShardManifest({"sha256": RunRecord.read_classifier(places.run).adapter_sha256}, {"seed": 0})
        opened = open_output(output, wanted, shards, sources)
        survey(output, "jsonl", opened, sources, None, 2)
    except UserError as error:
        return Said(2, "", f"scalabl: {' '.join(str(error).split())}\n")
    except Exception as error:
        return Said(None, "", f"{type(error).__name__}: {error}")
    return Said(0, "", "")


def strategy_of(kind: str, places: Places) -> Any:
    """The inputs of a kind: bytes."""
    import grammars

    form, good, _ = KINDS[kind]
    if isinstance(good, str):
        base, _, name = good.partition("/")
        path = getattr(places, base) / name
        good = path.read_bytes() if form == "safetensors" else json.loads(path.read_text(encoding="utf-8"))
    return getattr(grammars, f"{form}_file")(good)


def tried(kind: str, places: Places, data: bytes, which: int, room: Path, own: bool) -> tuple[Said, str | None]:
    """What the program says of one input, and what is wrong with that."""
    directory = Path(tempfile.mkdtemp(dir=room))
    try:
        if kind == "directory of shards":
            said = examined_shards(places, directory, data, which)
            return said, said.fault
        arguments = KINDS[kind][2](places, directory, data, which)
        before = tree(directory)
        said = here(arguments)
        fault, after = said.fault, tree(directory)
        if fault is None:
            left = sorted(after.keys() - before.keys())
            left = left if said.code == 2 else [name for name in left if "/." in f"/{name}"]
            if left:
                fault = f"left behind {left[:3]}"
            elif said.code == 2 and after != before:
                fault = "a file that was there has changed"
            elif said.code == 2 and own and (other := apart(arguments)).code != 2:
                fault = f"in a process of its own: {other.fault or other.code}"
        return said, fault
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass
class Tally:
    """What became of the inputs.

    Attributes:
        own: every so-manyth refusal is repeated in a process of its own.
        counts: by kind and outcome: "refused", "finished", "fault".
        faults: each with its kind, what is wrong, and the input.
    """

    own: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    refusals: int = 0

    def try_kind(self, kind: str, places: Places, room: Path, number: int, seed: int) -> None:
        """Try so many inputs of a kind."""

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=number, database=None, deadline=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(strategy_of(kind, places), hypothesis.strategies.integers(0, 29))
        def one(data: bytes, which: int) -> None:
            said, fault = tried(kind, places, data, which, room, own=self.refusals % self.own == self.own - 1)
            self.refusals += said.code == 2
            self.counts[kind, "fault" if fault else "refused" if said.code == 2 else "finished"] += 1
            if fault:
                self.faults.append({"kind": kind, "fault": fault, "which": which, "input": ascii(data[:2000])})
                print(f"{kind}, {which}: {fault}\n{said.err[-1500:]}", file=sys.stderr, flush=True)

        one()


def main() -> None:
    """Try the inputs, and write what became of them."""
    chosen = options(
        __doc__, inputs=(1000, "how many, of all kinds together"), seed=(0, "of Hypothesis"),
        own=(50, "every so-manyth refusal is repeated in a process of its own"),
        kinds=("", "only the kinds whose names have this in them"), results=("yes", "write them", ("yes", "no")),
    ).parse_args()  # fmt: skip
    warnings.simplefilter("ignore")
    kinds = [kind for kind in KINDS if chosen.kinds in kind]
    tally, started = Tally(chosen.own), time.monotonic()
    with tempfile.TemporaryDirectory() as name, offline(Path(name)):
        from chat_base import PLAIN, chat_base
        from tiny_base import tiny_base

        set_hypothesis_home_dir(Path(name) / "hypothesis")
        room = Path(name) / "cases"
        room.mkdir()
        chat = chat_base(Path(name) / "chat", PLAIN)
        places = Places(tiny_run(Path(name)), tiny_run(Path(name), "mle"), Path(name) / "task", tiny_base(), chat)
        for number, kind in enumerate(kinds):
            share = chosen.inputs // len(kinds) + (number < chosen.inputs % len(kinds))
            tally.try_kind(kind, places, room, share, chosen.seed)
            print(f"{kind}: {share} tried, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    counts, faults = tally.counts, tally.faults
    rows = [
        {"kind": kind, **{outcome: counts[kind, outcome] for outcome in ("refused", "finished", "fault")}}
        for kind in kinds
    ]
    rows.append({"kind": "all"} | {name: sum(row[name] for row in rows) for name in ("refused", "finished", "fault")})
    page = f"""# Hostile inputs

{sum(counts.values()):,} inputs made by Hypothesis from grammars of our own formats. Refused: exit code 2, one sentence
and no file left. Finished: the input was good enough. A fault is anything else, a call of more than {LIMIT:g} s
included.

{table(rows, ("kind", "{kind}"), ("refused", "{refused}"), ("finished", "{finished}"), ("faults", "{fault}"))}
"""
    took = f"{time.monotonic() - started:.0f} s"
    if chosen.results == "yes":
        write(
            "hostile", {"rows": rows, "faults": faults}, page, took=took, seed=str(chosen.seed),
            hypothesis=hypothesis.__version__,
        )  # fmt: skip
    else:
        print(page, took)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
