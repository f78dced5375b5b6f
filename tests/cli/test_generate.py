"""`scalabl generate` and `scalabl evaluate` on open questions, on finished runs of seconds."""

import io
import json
import math
import shutil
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console
from tiny_base import write_jsonl
from transformers import GenerationConfig

import scalabl
import scalabl.cli.evaluate  # noqa: F401  (adds its command to the app)
from scalabl.cli import main as _commands  # noqa: F401
from scalabl.cli.app import app
from scalabl.core.errors import UserError
from scalabl.generation.answer import GeneratedAnswer, Token, in_terminal
from scalabl.generation.confidence import AnswerSettings, Confidence
from scalabl.generation.generate import CONFIDENCE, AnswerSampling, unused_confidence
from scalabl.runs.loading import load_run
from scalabl.runs.record import RunRecord


@pytest.fixture
def own_run(scalabl_run: Path, tmp_path: Path) -> Path:
    """A copy that a confidence may be written into."""
    return Path(shutil.copytree(scalabl_run, tmp_path / "run"))


@pytest.fixture
def open_rows(tmp_path: Path) -> Path:
    """Open questions; every other one counts any text that has a letter of the tiny model's as right."""
    for split, number in (("train", 4), ("validation", 8), ("test", 6)):
        rows = [{"question": f"{split} {i} red or blue?", "answers": ["red", "blue"]} for i in range(number)]
        write_jsonl(tmp_path / "open" / f"{split}.jsonl", rows)
    return tmp_path / "open"


def test_answers_as_json_and_page(program, scalabl_run, tmp_path):
    said = program(
        "generate", scalabl_run, "--prompt", "red blue", "--prompt", "stone <b>", "--max-new-tokens", 5, "--samples", 4,
        "--json", tmp_path / "a.json", "--html", tmp_path / "a.html",
    )  # fmt: skip
    assert said.code == 0 and "confidence" in said.out and "epistemic" in said.out
    answers = json.loads((tmp_path / "a.json").read_text())
    assert [answer["prompt"] for answer in answers] == ["red blue", "stone <b>"]
    for answer in answers:
        probabilities = [token["probability"] for token in answer["tokens"]]
        assert answer["confidence"] == pytest.approx(math.prod(probabilities) ** (1 / len(probabilities)), rel=1e-4)
        assert not answer["calibrated"]
        for token in answer["tokens"]:
            assert token["total"] == pytest.approx(token["aleatoric"] + token["epistemic"], abs=1e-5)
    page = (tmp_path / "a.html").read_text()
    assert "stone &lt;b&gt;" in page and "<b>" not in page  # what a model or a user says is no markup
    assert page.count('class="t l') == sum(len(answer["tokens"]) for answer in answers)


def test_the_call_and_the_command_agree(program, scalabl_run, tmp_path):
    program("generate", scalabl_run, "--prompt", "red blue", "--max-new-tokens", 6, "--json", tmp_path / "a.json")
    [found] = scalabl.generate(scalabl_run, ["red blue"], max_new_tokens=6)
    assert json.loads((tmp_path / "a.json").read_text())[0] == json.loads(json.dumps(found.as_dict()))


def test_a_line_s_end_in_a_prompt_is_one_as_in_a_stop(program, scalabl_run, tmp_path):
    options = ("--prompt", r"red\nblue", "--stop", r"\n", "--max-new-tokens", 3, "--json", tmp_path / "a.json")
    assert program("generate", scalabl_run, *options).code == 0
    assert json.loads((tmp_path / "a.json").read_text())[0]["prompt"] == "red\nblue"


def test_a_plain_lora_and_the_mean_have_one_particle(program, mle_run, scalabl_run):
    for run, samples in ((mle_run, 10), (scalabl_run, 0)):
        [answer] = scalabl.generate(run, ["red blue"], samples=samples, max_new_tokens=4)
        assert max(token.epistemic for token in answer.tokens) == 0
        assert answer.scores["variance_log_probability"] == 0


def test_batches_do_not_change_answers(scalabl_run):
    prompts = ["red blue", "stone", "a long answer yes no", "bee"]
    together = scalabl.generate(scalabl_run, prompts, max_new_tokens=5)
    for prompt, answer in zip(prompts, together, strict=True):
        [alone] = scalabl.generate(scalabl_run, [prompt], max_new_tokens=5)
        assert alone.text == answer.text
        assert alone.confidence == pytest.approx(answer.confidence, rel=1e-4)


def test_further_answers_give_semantic_scores(scalabl_run):
    [answer] = scalabl.generate(scalabl_run, ["red"], max_new_tokens=4, sampling=AnswerSampling(3))
    assert 0 <= answer.scores["semantic_entropy"] <= math.log(3) + 1e-9
    assert 0 <= answer.scores["self_consistency"] <= 1


def test_a_text_does_not_steer_the_terminal():
    token = Token("\x1b]0;own\x07[red]\x9b2J", 0.5, 0.1, 0.1, 0.3)
    answer = GeneratedAnswer("\x1b[2Jwhat [/]?\n\tthis", token.text, 0.5, False, {}, (token,), True)
    file = io.StringIO()
    Console(file=file, width=200).print(in_terminal([answer]))
    shown = file.getvalue()
    assert not {c for c in shown if unicodedata.category(c) == "Cc"} - {"\n"}
    assert "[red]" in shown and "what [/]?" in shown


@pytest.mark.parametrize(
    ("prompts", "word"), [([], "no prompt"), (["red", "blue", " "], "empty"), (["\udcff"], "UTF-8")]
)
def test_bad_prompts_are_refused_before_any_is_answered(scalabl_run, prompts, word):
    done = []
    with pytest.raises(UserError, match=word):
        scalabl.generate(scalabl_run, prompts, max_new_tokens=2, batch_size=1, advance=done.append)
    assert not done


def test_sampling_repeats_by_its_seed(scalabl_run):
    settings = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
    first, again = (scalabl.generate(scalabl_run, ["red"], seed=5, **settings)[0].text for _ in range(2))
    assert first == again


def test_questions_of_a_file(program, scalabl_run, tmp_path):
    file = write_jsonl(tmp_path / "p.jsonl", [{"question": "red?"}, {"prompt": "blue"}])
    program("generate", scalabl_run, "--input", file, "--max-new-tokens", 2, "--json", tmp_path / "a.json")
    prompts = [answer["prompt"] for answer in json.loads((tmp_path / "a.json").read_text())]
    assert prompts == ["Question: red?\nAnswer:", "blue"]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "Give prompts"),
        (("--prompt", " "), "blank"),
        (("--prompt", "red", "--temperature", "0"), "above 0"),
        (("--prompt", "red", "--top-p", "1.5"), "at most 1"),
        (("--prompt", "red", "--max-new-tokens", "0"), "at least 1"),
        (("--prompt", "red", "--answers", "1"), "at least 2"),
        (("--prompt", "red", "--chat"), "no chat template"),
        (("--prompt", "red", "--json", "nowhere/a.json"), "cannot be written"),
        (("--input", "missing.jsonl"), "does not exist"),
    ],
)
def test_bad_input(program, scalabl_run, arguments, word):
    assert word in program("generate", scalabl_run, *arguments).sentence()


def test_open_questions_are_judged_and_a_confidence_is_kept(program, own_run, open_rows, tmp_path):
    said = program(
        "evaluate", own_run, "--data", open_rows, "--max-new-tokens", 3, "--answers", 3, "--samples", 3,
        "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert said.code == 0 and "no confidence was fitted" in said.out and "20 validation answers" in said.out
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["n"] == 6 and found["accuracy"] == 0
    assert found["scores"]["semantic_entropy"]["tokens"] > found["scores"]["mean_entropy"]["tokens"]
    assert found["scores"]["mean_entropy"]["auroc"]["reason"]
    assert not (own_run / CONFIDENCE).exists()


def keep_confidence(run, **made):
    """Keep a confidence that was fitted on answers that were made so; it is 0.25 for every one."""
    digest = RunRecord.read_finished(run).adapter_sha256
    settings = AnswerSettings(**{"particles": 10, "stop": (), "chat": False, "adapter_sha256": digest} | made)
    Confidence(
        "isotonic", ("mean_entropy",), (-1,), 0.1, 0.9, 20, 8, knots=(-20.0, 0.0), heights=(0.25, 0.25), made=settings
    ).save(run / CONFIDENCE)


def test_a_fitted_confidence_is_used(own_run):
    keep_confidence(own_run)
    [answer] = scalabl.generate(own_run, ["red"], max_new_tokens=3)
    assert answer.calibrated and answer.confidence == 0.25
    [plain] = scalabl.generate(own_run, ["red"], max_new_tokens=3, do_sample=False)
    assert plain == answer


@pytest.mark.parametrize(
    ("made", "asked", "why"),
    [
        ({}, {"samples": 4}, "answers of 10 particles, and these are of 4 particles"),
        ({}, {"samples": 0}, "and these are of the posterior mean"),
        ({}, {"stop": ["\n", "y"]}, r"that end at no text, and these end at '\n' or 'y'"),
        ({"stop": ("\n",)}, {"stop": []}, r"that end at '\n', and these end at no text"),
        ({"chat": True}, {}, "with the chat template, and these are without it"),
        ({}, {"do_sample": True}, "greedy answers, and these are sampled"),
        ({}, {"generation_config": GenerationConfig(do_sample=True)}, "greedy answers, and these are sampled"),
        ({}, {"repetition_penalty": 1.5}, "by settings of their own"),
        ({"adapter_sha256": "ab" * 32, "stop": ("\n",)}, {}, "answers of another adapter"),
    ],
)
def test_a_confidence_of_answers_made_otherwise_is_not_used(own_run, made, asked, why):
    keep_confidence(own_run, **made)
    [answer] = scalabl.generate(own_run, ["red"], max_new_tokens=3, **asked)
    likelihood = math.exp(answer.scores["mean_log_probability"])
    assert not answer.calibrated and answer.confidence == pytest.approx(likelihood, rel=1e-6)
    said = unused_confidence(load_run(own_run, generating=True), answer.scores, **{"samples": 10} | asked)
    assert said.startswith("The confidence that the run has is not used: ") and why in said


def test_answers_end_as_those_of_the_confidence_unless_it_is_said(own_run):
    [whole] = scalabl.generate(own_run, ["red"], max_new_tokens=6)
    keep_confidence(own_run, stop=(whole.text[3],))
    [answer] = scalabl.generate(own_run, ["red"], max_new_tokens=6)
    assert answer.calibrated and answer.text == whole.text[: whole.text.index(whole.text[3])].strip()
    assert scalabl.generate(own_run, ["red"], max_new_tokens=6, stop=[])[0].text == whole.text


def test_what_evaluate_fits_is_generate_s_confidence(program, own_run, tmp_path):
    """Every other question is answered as its row has it."""
    texts = [f"red {i} blue?" for i in range(24)]
    prompts = [f"Question: {text}\nAnswer:" for text in texts]
    found = scalabl.generate(own_run, prompts, max_new_tokens=3, stop=["\n"])
    rows = [
        {"question": text, "answers": [answer.text if i % 2 else "nothing of it"]}
        for i, (text, answer) in enumerate(zip(texts, found, strict=True))
    ]
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / "open" / f"{split}.jsonl", rows)
    said = program("evaluate", own_run, "--data", tmp_path / "open", "--max-new-tokens", 3)
    assert said.code == 0 and "no confidence was fitted" not in said.out
    asked = ("generate", own_run, "--prompt", r"Question: red 1 blue?\nAnswer:", "--max-new-tokens", 3)
    said = program(*asked)
    assert said.code == 0 and "not calibrated" not in said.out and "is not used" not in said.out
    other = program(*asked, "--samples", 3)
    assert "not calibrated" in other.out and "of 10 particles, and these are of 3" in " ".join(other.out.split())


def test_open_questions_are_put_into_the_chat_template_where_it_is_said(program, mle_run, open_rows):
    asked = ("evaluate", mle_run, "--data", open_rows, "--max-new-tokens", 1)
    assert "This model's tokenizer has no chat template" in program(*asked, "--chat").sentence()
    assert program(*asked, "--no-chat").code == 0


def test_open_questions_are_answered_by_one_process(mle_run, open_rows, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="answered by one process; start it without accelerate launch"):
        app(["evaluate", str(mle_run), "--data", str(open_rows)], standalone_mode=False)


@pytest.mark.parametrize("measure", ["f1", "bleu"])
def test_measures_that_are_no_right_or_wrong(program, scalabl_run, open_rows, measure):
    assert "--measure" in program("evaluate", scalabl_run, "--data", open_rows, "--measure", measure).sentence()
