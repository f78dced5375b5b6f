"""`serving.vllm`: the answers of a server that serves exported particles are the run's own, and what is refused."""

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from page_blocks import run_blocks
from particle_server import ParticleServer, serving
from program import short
from served import LABELS, NUMBER, SEED, client
from tiny_base import adapted, loaded, questions, write_jsonl
from transformers import AutoModelForSequenceClassification

from scalabl.core.errors import UserError
from scalabl.data import Example
from scalabl.inference.calibration import Calibration
from scalabl.inference.classifier import Classifier, rows_of
from scalabl.metrics.uncertainty import apply_temperature, average
from scalabl.predictive import MonteCarloPredictive, predict
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord
from scalabl.scoring import Continuation, Letters, Scorer, Scoring
from scalabl.serving.export import export
from scalabl.serving.http import JSONClient
from scalabl.serving.manifest import read_manifest
from scalabl.serving.requests import BY, By, split
from scalabl.serving.vllm import VLLMClassifier
from scalabl.training.run import train


@pytest.mark.parametrize("by", BY)
def test_choice_texts_have_the_runs_own_probabilities(
    exported: Path, scored_run: Path, server: ParticleServer, by: By
) -> None:
    rows = questions(7)
    answer = client(exported, server, by=by)(rows)
    ours = Classifier.from_pretrained(scored_run, samples=NUMBER, seed=SEED, predictive="mc")(rows)
    assert ours.epistemic.min() > 1e-4, "the particles are alike, so nothing is compared"
    assert answer.particle_log_probs.shape == (NUMBER, 7, 5)
    for name in ("probs", "entropy", "aleatoric", "epistemic", "particle_log_probs"):
        np.testing.assert_allclose(getattr(answer, name), getattr(ours, name), atol=2e-5, err_msg=name)
    assert answer.label == ours.label
    assert max(len(set(batch)) for batch in server.batches) > 1, "the adapters were not mixed in a batch"
    assert len(server.bodies) == NUMBER * len(rows)


def test_letters_have_the_runs_own_probabilities(exported: Path, scored_run: Path, server: ParticleServer) -> None:
    prompts = [f"text {i}\nLabel:" for i in range(5)]
    answer = client(exported, server, labels=LABELS)(prompts)
    ours = Classifier.from_pretrained(scored_run, labels=LABELS, samples=NUMBER, seed=SEED, predictive="mc")(prompts)
    np.testing.assert_allclose(answer.particle_log_probs, ours.particle_log_probs, atol=2e-5)
    np.testing.assert_allclose(answer.epistemic, ours.epistemic, atol=2e-5)
    assert answer.label == ours.label


def test_rows_with_fewer_choices_than_letters(exported: Path, scored_run: Path, server: ParticleServer) -> None:
    _, tokenizer = loaded()
    run, rows = load_run(scored_run), questions(6, choices=(3, 4))
    letters = Letters(tokenizer)
    answer = VLLMClassifier(read_manifest(exported), letters, url=server.url)(rows)
    encoded = [letters.encode(row) for row in rows]
    ours = predict(Scorer(run.scorer.model, letters), encoded, MonteCarloPredictive(NUMBER, seed=SEED))
    np.testing.assert_allclose(answer.particle_log_probs, ours.numpy(), atol=2e-5)
    assert answer.probs.shape == (6, 5), "the scoring has five letters, whatever these rows have"
    assert (answer.probs[[len(row.choices) == 3 for row in rows]][:, 3:] == 0).all()


def test_texts_that_name_too_many_tokens_take_several_requests(
    exported: Path, server: ParticleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = questions(3)
    one = client(exported, server)(rows)
    assert len(server.bodies) == 3 * NUMBER
    monkeypatch.setattr("scalabl.serving.requests._MOST_TOKENS", 6)
    several = client(exported, server)(rows)
    bodies = server.bodies[3 * NUMBER :]
    assert len(bodies) > 3 * NUMBER
    assert all(len(body["logprob_token_ids"]) <= 6 for body in bodies)
    np.testing.assert_allclose(several.particle_log_probs, one.particle_log_probs, atol=1e-5)


def test_choices_that_begin_alike_are_asked_for_once(exported: Path, server: ParticleServer) -> None:
    asking = client(exported, server)
    asking([{"question": "which?", "choices": ["a b c d", "a b c e"]}])
    prompt, choices = split(
        asking.scoring.encode(rows_of([Example("0", "which?", ("a b c d", "a b c e"), None)], None)[0])
    )
    (body, *_) = server.bodies
    prefixes = {tuple(prompt + ids[:j]) for ids in choices for j in range(len(ids))}
    assert len(prefixes) < sum(map(len, choices))
    assert sorted(map(tuple, body["prompt"])) == sorted(prefixes)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("scoring", ["letters", "continuation"])
def test_an_adapted_output_layer(tmp_path: Path, scoring: str) -> None:
    model, (_, tokenizer), rows = adapted(target_modules=["q_proj", "lm_head"]), loaded(), questions(4)
    model.save_pretrained(str(tmp_path))
    manifest = export(tmp_path, 2)
    made: Scoring = Letters(tokenizer) if scoring == "letters" else Continuation(tokenizer, normalization="sum")
    with serving(tmp_path / "particles", manifest.adapters) as server:
        answer = VLLMClassifier(manifest, made, url=server.url)(rows)
    ours = predict(Scorer(model, made), [made.encode(row) for row in rows], MonteCarloPredictive(2))
    np.testing.assert_allclose(answer.particle_log_probs, ours.numpy(), atol=2e-5)
    said = "for choice texts" if scoring == "letters" else "vLLM issue 51594"
    with pytest.raises(UserError, match=said):
        VLLMClassifier(manifest, made, by="prompt")


def test_a_prefix_stands_before_every_prompt(exported: Path, scored_run: Path, server: ParticleServer) -> None:
    rows, prefix = questions(3), "Question: a b c d e\nAnswer: green\n" * 2
    answer = client(exported, server, prefix=prefix)(rows)
    ours = Classifier.from_pretrained(scored_run, samples=NUMBER, seed=SEED, predictive="mc", prefix=prefix)(rows)
    np.testing.assert_allclose(answer.particle_log_probs, ours.particle_log_probs, atol=2e-5)


def test_the_temperature_is_that_of_the_particles(exported: Path, server: ParticleServer) -> None:
    rows = questions(4)
    plain = client(exported, server)(rows)
    tempered = client(exported, server, temperature=2.5)(rows)
    expected = apply_temperature(torch.from_numpy(plain.particle_log_probs).double(), 2.5)
    np.testing.assert_allclose(tempered.particle_log_probs, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(tempered.probs, average(expected).numpy(), atol=1e-5)


def test_a_calibrated_run_is_served_as_it_predicts(copied_run: Path, tmp_path: Path) -> None:
    fitted = Calibration(1.6, {"mean": 1.3, "mc": 1.4}, "mc", 10, 0, 30, "", {"before": 1.0, "after": 0.9})
    plain = export(copied_run, 2, tmp_path / "plain")
    assert not plain.calibrated and "scale" not in plain.as_dict()["identity"]
    replace(RunRecord.read(copied_run), calibration=fitted.as_dict()).write(copied_run)
    rows = questions(4)
    ours = Classifier.from_pretrained(copied_run, samples=2, predictive="mc")(rows)
    raw = Classifier.from_pretrained(copied_run, samples=2, predictive="mc", raw=True)(rows)
    for name, expected in (("calibrated", ours), ("raw", raw)):
        manifest = export(copied_run, 2, tmp_path / name, raw=name == "raw")
        assert read_manifest(tmp_path / name) == manifest and manifest.identity.scale == (1.0 if name == "raw" else 1.6)
        with serving(tmp_path / name / "particles", manifest.adapters) as server:
            answer = VLLMClassifier.from_export(tmp_path / name, url=server.url)(rows)
        np.testing.assert_allclose(answer.particle_log_probs, expected.particle_log_probs, atol=2e-5)
    with pytest.raises(UserError, match=r"its scale is 1\.0, now 1\.6"):
        export(copied_run, 2, tmp_path / "plain")


def test_the_distribution_is_asked_for_as_it_is(exported: Path, server: ParticleServer) -> None:
    """A server fills what is not given from its model's generation_config.json."""
    client(exported, server)(questions(1))
    (body, *_) = server.bodies
    assert body["logprob_token_ids"] and body["logprobs"] == 20
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 1}
    assert {name: body[name] for name in neutral} == neutral
    assert all(isinstance(token, int) for prompt in body["prompt"] for token in prompt)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_a_time_than_asked_for(exported: Path, server: ParticleServer, concurrency: int) -> None:
    server.faults.delay = 0.02
    client(exported, server, concurrency=concurrency)(questions(5))
    assert server.under_way == concurrency
    assert len(server.bodies) == 5 * NUMBER


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:port"])
def test_an_address_that_is_none(exported: Path, url: str) -> None:
    with pytest.raises(UserError, match="is no address"):
        VLLMClassifier.from_export(exported, url=url)


def test_the_address_may_end_in_v1(exported: Path, server: ParticleServer) -> None:
    answer = VLLMClassifier.from_export(exported, url=f"{server.url}/v1/")(questions(1))
    assert answer.probs.sum() == pytest.approx(1, abs=1e-5)


def test_bad_settings_and_questions(exported: Path, server: ParticleServer, tmp_path: Path) -> None:
    for options, said in (
        ({"concurrency": 0}, "concurrency is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_logprobs": 0}, "top_logprobs is 0"),
        ({"by": "echo"}, "by is 'echo'"),
        ({"timeout": 0}, "timeout is 0"),
        ({"retries": -1}, "retries -1"),
    ):
        with pytest.raises(UserError, match=said):
            VLLMClassifier.from_export(exported, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no questions"):
        client(exported, server)([])
    with pytest.raises(UserError, match="scores choices"):
        client(exported, server)("a prompt")
    with pytest.raises(UserError, match="holds no exported particles"):
        VLLMClassifier.from_export(tmp_path)
    manifest = replace(read_manifest(exported), scoring=None)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.as_dict()))
    with pytest.raises(UserError, match="does not say how rows are scored"):
        VLLMClassifier.from_export(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.as_dict() | {"format_version": 99}))
    with pytest.raises(UserError, match="is of format 99"):
        read_manifest(tmp_path)


def test_threads_of_a_client_have_connections_of_their_own(server: ParticleServer) -> None:
    asking, found, threads = JSONClient(server.url), [], []
    for _ in range(8):
        threads.append(threading.Thread(target=lambda: found.append(len(asking.get("/v1/models")["data"]))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert found == [NUMBER + 1] * 8


def test_no_server_library_is_imported() -> None:
    imports = "import sys, scalabl.serving.vllm, scalabl.serving.http"
    code = f"{imports}; sys.exit(bool({{'vllm', 'openai'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["head", "several"])
def test_a_decoder_s_head_has_the_runs_own_probabilities(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    if name == "several":
        rows = [{"text": f"red stone {i}", "labels": [["a"], ["b"], ["a", "b"], []][i % 4]} for i in range(24)]
        for split, own in (("train", rows[:16]), ("validation", rows[16:])):
            write_jsonl(tmp_path / "rows" / f"{split}.jsonl", own)
        settings = {"scoring": "head", "init_sigma": 0.5, "learning_rate": 0.05, "normalization": "sum"}
        run = tmp_path / "run"
        train(short(tmp_path / "rows", **settings), run)
    else:
        run = runs["head"]
    manifest = export(run, NUMBER, tmp_path / "out", seed=SEED)
    base = RunRecord.read(run).model
    number = len(RunRecord.read(run).scoring["labels"])
    assert manifest.head and manifest.head_labels == number
    classifies = AutoModelForSequenceClassification.from_pretrained(base, num_labels=number, pad_token_id=0)
    texts = ["red stone", "a blue ninety-nine of stone", "bee"]
    with serving(tmp_path / "out" / "particles", manifest.adapters, base=classifies) as server:
        asking = VLLMClassifier.from_export(tmp_path / "out", url=server.url, timeout=30)
        answer = asking(texts)
        assert {body["model"] for body in server.bodies} == set(manifest.adapters)
        server.faults.answer = {"data": [{"index": 0, "probs": [0.0] * (number + 1)}]}
        with pytest.raises(UserError, match=f"answered with {number + 1} logits, but the run has {number} labels"):
            asking(texts)
        server.faults.answer = {"data": []}
        with pytest.raises(UserError, match="answered without the logits that were asked for"):
            asking(texts)
    ours = Classifier.from_pretrained(run, samples=NUMBER, seed=SEED, predictive="mc")(texts)
    assert ours.epistemic.min() > 1e-5, "the particles are alike, so nothing is compared"
    for field in ("probs", "entropy", "aleatoric", "epistemic", "particle_log_probs"):
        np.testing.assert_allclose(getattr(answer, field), getattr(ours, field), atol=2e-5, err_msg=field)
    assert (answer.label, answer.labels) == (ours.label, ours.labels)


def test_what_the_page_shows(
    exported: Path, server: ParticleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported, tmp_path / "runs" / "mine")
    made: Any = run_blocks("docs/scaling.md", {"rows": questions(3)}, {"http://127.0.0.1:8000": server.url})
    assert len(made["answer"].label) == 3 and (made["answer"].epistemic > 0).all()
