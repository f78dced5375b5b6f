"""Shards answered by a local Ray: every row once and as one process answers it, whoever is killed on the way."""

# ruff: noqa: E402  (what is tested imports ray)
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from head_bases import LABELS, body_of, stock_head
from sharded_rows import SIZES, address_of, all_rows, answers_in, read_answers, titles, write_shards
from tiny_base import as_json, questions, tiny_base, write_jsonl

ray = pytest.importorskip("ray")
import scalabl.cli.predict  # noqa: F401  (adds its command to the app)
import scalabl.serving.batch as module
from scalabl.cli.app import app
from scalabl.core.errors import UserError
from scalabl.data import load_rows
from scalabl.data.load import with_labels
from scalabl.inference.batch_prediction import predict_file
from scalabl.inference.promise import Promise
from scalabl.inference.settings import PredictionSettings
from scalabl.metrics.selective import Threshold
from scalabl.predictive.sampling import Sampling
from scalabl.runs.settings import Settings
from scalabl.serving.batch import Summary, predict_shards
from scalabl.serving.batch_worker import ATTEMPTS, Setup, Worker, refusal
from scalabl.training.run import train


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two cores; this process is connected to it.

    Every worker imports torch, which is most of what these tests take: two at a time only where it matters.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with 30 held-out rows and a posterior that matters."""
    task = tmp_path_factory.mktemp("task")
    for seed, (split, number) in enumerate((("train", 24), ("validation", 30))):
        write_jsonl(task / f"{split}.jsonl", map(as_json, questions(number, seed=seed)))
    output = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings.flat(
        model=str(tiny_base()), data=str(task), steps=6, batch_size=4, r=4, layers="last:2", learning_rate=0.05,
        scoring="continuation", normalization="token", validation_rows=30, max_length=64, init_sigma=0.5,
    )  # fmt: skip
    train(settings, output)
    return output


def by_one_process(
    run: Path, directory: Path, *, batch_size: int = 8, tell: Any = None, **settings: Any
) -> list[dict[str, Any]]:
    rows = write_jsonl(directory / "rows.jsonl", map(as_json, all_rows()))
    asked, output = PredictionSettings(**settings), directory / "alone.jsonl"
    predict_file(run, load_rows(rows, require_answer=False), output, asked, batch_size=batch_size, tell=tell)
    return read_answers(directory / "alone.jsonl")


def assert_equal(found: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    """The same rows in the same order with the same answers, up to float32's rounding in other batches."""
    assert [answer["id"] for answer in found] == [row.id for row in all_rows()]
    for one, other in zip(found, alone, strict=True):
        if one.get("guess", "") is None:  # a column of Parquet has a place in every row
            one = {name: value for name, value in one.items() if name != "guess"}
        assert one.keys() == other.keys() and list(one["probs"]) == list(other["probs"])
        assert one["probs"] == pytest.approx(other["probs"], abs=1e-5)
        for name in one.keys() - {"probs"}:
            same = pytest.approx(other[name], abs=1e-5) if isinstance(other[name], float) else other[name]
            assert one[name] == same, name


def times(output: Path) -> dict[str, int]:
    return {str(path.relative_to(output)): path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}


def parts(output: Path) -> list[Path]:
    """What is answered already, a file a block; Ray Data writes in place, and its end last."""
    return [path for path in output.glob(".work/parts/*/*.parquet") if path.read_bytes()[4:].endswith(b"PAR1")]


def test_a_killed_worker_costs_nothing_but_its_block(cluster: str, run: Path, tmp_path: Path) -> None:
    shards, output = write_shards(tmp_path / "rows", "jsonl"), tmp_path / "answers"
    (shards / "_SUCCESS.jsonl").write_text("")  # no shard
    resolved: list[PredictionSettings] = []
    victims: list[int] = []
    done: list[Summary] = []
    over = threading.Event()

    def kill_who_is_at_work() -> None:
        while not victims and not over.wait(0.01):
            if any(path.name.isdigit() for path in output.glob(".work/begun/*")):  # a block is being answered
                at_work = [pid for pid, title in titles(os.getpid()).items() if "MapWorker" in title]
                at_work.sort(key=lambda pid: "submit" not in titles(os.getpid()).get(pid, ""))
                os.kill(at_work[0], signal.SIGKILL)
                victims.append(at_work[0])

    settings: dict[str, Any] = {"samples": 10, "seed": 1}
    killer = threading.Thread(target=kill_who_is_at_work)
    killer.start()
    try:
        done.append(
            predict_shards(
                run, shards, output, cluster, PredictionSettings(**settings), batch_size=1, block_rows=2,
                tell=resolved.append,
            )
        )  # fmt: skip
    finally:
        over.set()
        killer.join()
    assert len(victims) == 1
    assert done == [Summary(3, 24, 24, None)]
    told: list[str] = []
    alone = by_one_process(run, tmp_path, **settings, batch_size=1, tell=lambda resolved: told.append(resolved.why))
    assert_equal(answers_in(output, "jsonl"), alone)
    assert [one.why for one in resolved] == told and alone[0]["predictive"] == resolved[0].chosen
    assert times(output).keys() == {"manifest.json", *(f"{name}.jsonl" for name in SIZES)}

    # and once more there is nothing to do
    before = times(output)
    assert [predict_shards(run, shards, output, "127.0.0.1:1", PredictionSettings(**settings), block_rows=2)] == done
    assert times(output) == before


def test_a_killed_driver_goes_on_with_what_is_missing(
    cluster: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, output = write_shards(tmp_path / "rows", "parquet"), tmp_path / "answers"
    source, target = address_of(shards), address_of(output)  # through the store's own file system alone
    layers = {"samples": 12, "seed": 3, "stochastic_layers": "last:1"}
    confidences = sorted(answer["confidence"] for answer in by_one_process(run, tmp_path, **layers, predictive="mc"))
    middle = round((confidences[11] + confidences[12]) / 2, 6)
    settings = {**layers, "abstain": middle, "sampling": Sampling(confidence=0.9)}
    arguments = [
        "predict", run, "--input", source, "--output", target, "--ray", cluster, "--block-rows", 2, "--samples", 12,
        "--seed", 3, "--abstain", middle, "--stochastic-layers", "last:1", "--adaptive", "--confidence", 0.9,
    ]  # fmt: skip
    program = "from scalabl.cli import main; main()"
    driver = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while len(parts(output)) < 2:
        assert driver.poll() is None and time.monotonic() < deadline, driver.stderr and driver.stderr.read()
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    # the cluster ends the workers of a driver that is gone; what they have not written by then is missing
    while any("MapWorker" in title for title in titles(os.getpid()).values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    done = {path: path.stat().st_mtime_ns for path in parts(output)}
    rows_done = sum(pq.read_metadata(path).num_rows for path in done)
    assert 2 <= rows_done < 24

    before: list[dict[Path, int]] = []
    put_together = module._put_together

    def look(*arguments: Any) -> None:
        before.append({path: path.stat().st_mtime_ns for path in parts(output)})
        put_together(*arguments)

    monkeypatch.setattr(module, "_put_together", look)
    monkeypatch.setattr(module, "_workers", lambda *_: 1)
    summary = predict_shards(run, source, target, cluster, PredictionSettings(**settings), block_rows=2)
    (found,) = before
    assert found.items() >= done.items()
    assert len(found) == 13
    alone = by_one_process(run, tmp_path, **settings)
    assert_equal(answers_in(output, "parquet"), alone)
    answered = sum(answer["label"] is not None for answer in alone)
    assert 0 < answered < 24 and len({answer["particles"] for answer in alone}) > 1
    assert summary == Summary(3, 24, answered, pytest.approx(sum(a["particles"] for a in alone) / 24))
    assert not (output / ".work").exists()
    capsys.readouterr()
    app([str(word) for word in arguments], standalone_mode=False)  # nothing is left to do
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith("24 answers to 3 shards in") and "answered 12 of 24 rows (50.0%)" in words
    assert f"from {summary.particles:.1f} of at most 12 particles each" in words


def test_another_trainer_s_head_answers_as_in_one_process(cluster: str, tmp_path: Path) -> None:
    stock_head(tmp_path / "adapter", body_of("bert", tmp_path / "body"))
    rows = [{"id": f"t{i}", "text": f"red w{i} w{i + 1}"} for i in range(3)]
    (tmp_path / "rows").mkdir()
    shard = write_jsonl(tmp_path / "rows" / "a.jsonl", rows)
    names = {str(i): label for i, label in enumerate(LABELS)}
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({"id2label": names}))
    predict_shards(tmp_path / "adapter", tmp_path / "rows", tmp_path / "answers", cluster, PredictionSettings())
    alone = write_jsonl(tmp_path / "alone.jsonl", [])
    given = with_labels(load_rows(shard, labels=LABELS, require_answer=False), LABELS, shard)
    predict_file(tmp_path / "adapter", given, alone, PredictionSettings())
    for one, other in zip(read_answers(tmp_path / "answers" / "a.jsonl"), read_answers(alone), strict=True):
        assert (one["id"], one["label"]) == (other["id"], other["label"])
        assert one["probs"] == pytest.approx(other["probs"], abs=1e-5) and list(one["probs"]) == list(LABELS)


def test_a_row_that_cannot_be_answered_is_named_and_its_mend_redoes_its_shard_alone(
    cluster: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST", 8)
    monkeypatch.setattr(module, "_workers", lambda *_: 1)
    shards, output = write_shards(tmp_path / "rows", "jsonl"), tmp_path / "answers"
    part = shards / "day=2" / "part-0.jsonl"
    lines = part.read_text().splitlines()
    too_long = {"id": "long", "question": "which?", "choices": ["red", "blue " * 200]}
    part.write_text("\n".join([*lines[:3], "", json.dumps(too_long), *lines[3:]]) + "\n")
    promise = Promise(0.9, 0.6)
    settings = {"predictive": "mc", "samples": 4, "sampling": Sampling(draws="sobol"), "promise": promise}
    thresholds: list[Threshold | None] = []

    def note(resolved: PredictionSettings) -> None:
        thresholds.append(resolved.threshold)

    def answer() -> Summary:
        return predict_shards(
            run, shards, output, cluster, PredictionSettings(**settings), block_rows=3, tell=note
        )  # fmt: skip

    with pytest.raises(UserError, match=r"part-0\.jsonl:5: The choices of a row take .* All else is done; mend it"):
        answer()
    before = times(output)
    assert {f"{name}.jsonl" for name in list(SIZES)[:2]} <= before.keys() and "day=2/part-0.jsonl" not in before
    part.write_text("\n".join(lines) + "\n")
    # whose answers are taken away although they are there
    (shards / "a.jsonl").write_text("\n".join([*reversed((shards / "a.jsonl").read_text().splitlines())]) + "\n")
    answer()
    after = times(output)
    assert after["day=1/part-0.jsonl"] == before["day=1/part-0.jsonl"] and after["a.jsonl"] != before["a.jsonl"]
    turned = read_answers(output / "a.jsonl")[::-1]
    alone = by_one_process(run, tmp_path, **settings, tell=note)
    assert_equal(turned + answers_in(output, "jsonl")[7:], alone)
    assert len(thresholds) == 3 and thresholds[0] == thresholds[1]
    assert thresholds[0] is not None and thresholds[2] is not None
    assert thresholds[0].above == pytest.approx(thresholds[2].above, abs=1e-5)


def test_what_kills_workers_again_and_again_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup("", tmp_path, tmp_path, None, PredictionSettings(), 8, {0: Path("rows.jsonl")})
    worker = Worker(setup)
    worker.predictor = object()  # type: ignore[assignment]

    def die(*_: Any) -> list[tuple[int, str]]:
        raise SystemExit

    texts = {"id": ["a", "b"], "question": ["?", "?"], "pair": [None, None], "rendered": [False, False]}
    batch = pa.table({"key": [5, 6], **texts, "choices": [[], []], "images": [[], []]})
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_answers", die)
        for _ in range(ATTEMPTS):
            with pytest.raises(SystemExit):
                worker(batch)
    with pytest.raises(
        UserError,
        match=r"3 workers died at the 2 rows from rows\.jsonl:5 on, perhaps out of memory; lower --batch-size",
    ):
        worker(batch)
    monkeypatch.setattr(worker, "_answers", lambda *_: [(7, "x"), (-8, "y")])
    assert worker(batch.slice(1)).to_pylist() == [
        {"key": 7, "shard": 0, "answer": "x"},
        {"key": -8, "shard": 0, "answer": "y"},
    ]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["5"]


def test_a_refusal_of_a_worker_is_its_sentence_and_a_machine_without_the_package_is_named() -> None:
    refused = refusal(
        ray.exceptions.RayTaskError(
            "submit", "Traceback ...", UserError("No such model; give another.\nFailed to apply ...")
        )
    )
    assert type(refused) is UserError and str(refused) == "No such model; give another."
    sentence = str(refusal(RuntimeError("trace\n\nModuleNotFoundError: No module named 'scalabl.serving'")))
    assert sentence.startswith("Workers cannot start (") and sentence.endswith(
        "install the same scalabl on every machine."
    )


@pytest.fixture
def begun(run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Shards and an output directory whose manifest says that nothing of them is done."""
    shards, output = write_shards(tmp_path / "rows", "jsonl"), tmp_path / "answers"
    with pytest.MonkeyPatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(module, "_resolve_remotely", lambda *_: (PredictionSettings("mc"), 1))
        patch.setattr(module, "_workers", lambda *_: 1)
        patch.setattr(module, "_answer", stop)
        patch.setattr(module, "connected", _no_cluster)
        patch.setattr(module, "gpus_each", lambda ray: 0)
        with pytest.raises(KeyboardInterrupt):
            predict_shards(run, shards, output, "local", PredictionSettings(predictive="mc"))
    return shards, output


def _no_cluster(address: str) -> Any:
    from contextlib import nullcontext

    return nullcontext()


def test_another_adapter_other_settings_and_lost_shards_are_refused(
    begun: tuple[Path, Path], run: Path, tmp_path: Path
) -> None:
    shards, output = begun
    before = (output / "manifest.json").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(run, other)
    record = json.loads((other / "scalabl.json").read_text())
    weights = bytearray((other / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "adapter_model.safetensors").write_bytes(weights)
    from scalabl.core.files import sha256

    record["adapter_sha256"] = sha256(other / "adapter_model.safetensors")
    (other / "scalabl.json").write_text(json.dumps(record))

    def refused(
        directory: Path = run, given: Path = shards, settings: PredictionSettings | None = None, **more: Any
    ) -> str:
        with pytest.raises(UserError) as error:
            predict_shards(directory, given, output, "127.0.0.1:1", settings or PredictionSettings("mc"), **more)
        return str(error.value)

    assert "holds answers of another adapter" in refused(other)
    assert "other settings (samples was 10, now 3)" in refused(settings=PredictionSettings("mc", 3))
    assert "other settings (promise was None, now {'max_error'" in refused(
        settings=PredictionSettings("mc", promise=Promise(0.5))
    )
    assert "other settings (format was jsonl, now parquet)" in refused(format="parquet")
    assert "has answers to a, which" in refused(given=shards / "day=1")
    assert "The Ray cluster 127.0.0.1:1 cannot be reached" in _unconnected(refused)
    assert (output / "manifest.json").read_bytes() == before


def _unconnected(refused: Any) -> str:
    """Where this process has a connection, that would be used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        sentence: str = refused()
        return sentence


def test_a_cluster_of_another_kind_does_not_go_on(
    begun: tuple[Path, Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "connected", _no_cluster)
    monkeypatch.setattr(module, "gpus_each", lambda ray: 1)
    with pytest.raises(UserError, match="made on a CPU, and this cluster would go on with a GPU"):
        predict_shards(run, *begun, "local", PredictionSettings(predictive="mc"))


def test_a_second_call_waits_for_no_one(begun: tuple[Path, Path], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(module, "connected", _no_cluster)
    monkeypatch.setattr(module, "gpus_each", lambda ray: 0)
    with (
        FileLock(begun[1] / ".work" / "lock"),
        pytest.raises(UserError, match="Another call writes into"),
    ):
        predict_shards(run, *begun, "local", PredictionSettings(predictive="mc"))


def test_workers_are_as_many_as_gpus_or_as_cores_and_memory_allow() -> None:
    class Resources:
        def __init__(self, **found: float) -> None:
            self.found = found

        def cluster_resources(self) -> dict[str, float]:
            return self.found

    assert module._workers(Resources(CPU=64, GPU=8.0), 1, 10**12) == 8
    assert module._workers(Resources(CPU=64, memory=160e9), 0, 10**10) == 10
    assert module._workers(Resources(CPU=4, memory=160e9), 0, 10**10) == 4
    assert module._workers(Resources(CPU=4, memory=1e9), 0, 10**10) == 1


def test_options_that_do_not_go_together(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_shards(tmp_path / "rows", "jsonl")
    arguments = ["predict", str(run), "--input", str(shards), "--output", str(tmp_path / "out")]

    def refused(*more: object) -> str:
        with pytest.raises(UserError) as error:
            app([*arguments, *map(str, more)], standalone_mode=False)
        return str(error.value)

    assert "--format is for --ray" in refused("--format", "parquet")
    assert "The format is 'csv'; it must be jsonl or parquet" in refused("--ray", "local", "--format", "csv")
    assert "A block of 0 rows is none" in refused("--ray", "local", "--block-rows", 0)
    assert "must be mean, mc or linearized" in refused("--ray", "local", "--predictive", "best")
    assert "is a directory" in refused()
    elsewhere = ["predict", str(run), "--input", "s3://bucket/rows", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"s3://bucket/rows is of a store; add --ray local"):
        app(elsewhere, standalone_mode=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--ray shares the work by itself" in refused("--ray", "local")
    assert not (tmp_path / "out").exists()
