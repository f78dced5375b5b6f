"""`scalabl export`: what it prints is what vLLM's own parser takes, and nothing heavy runs before its refusals."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scalabl.cli import main
from scalabl.core.errors import UserError
from scalabl.core.files import sha256
from scalabl.runs.record import RECORD, RunRecord
from scalabl.serving.export import export
from scalabl.serving.manifest import as_shell, read_manifest, vllm_command


def said(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `scalabl export ...`."""
    monkeypatch.setattr(sys, "argv", ["scalabl", "export", *map(str, arguments)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


def test_it_writes_and_prints_the_line(
    copied_run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = said(capfd, monkeypatch, copied_run, "--particles", 2, "--seed", 3)
    assert (code, err) == (0, "")
    first, line = out.split("\n", 1)
    directory = copied_run / "particles"
    assert first == f"2 particles in {directory}"
    base = read_manifest(copied_run).base_model
    assert shlex.split(line.replace("\\\n", "")) == [
        "vllm", "serve", base, "--host", "127.0.0.1", "--port", "8000", "--dtype", "float32", "--enable-lora",
        "--max-lora-rank", "8", "--max-loras", "2",
        "--lora-modules", f"particle-0={directory / '0'}", f"particle-1={directory / '1'}",
    ]  # fmt: skip
    again = said(
        capfd,
        monkeypatch,
        copied_run,
        "--particles",
        2,
        "--seed",
        3,
        "--model",
        "org/base",
        "--port",
        9,
        "--host",
        "::1",
    )
    assert again[0] == 0 and "vllm serve org/base \\\n    --host ::1 \\\n    --port 9 \\\n" in again[1]


def test_a_decoder_s_head_is_served_by_the_line(
    runs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = said(capfd, monkeypatch, runs["head"], "--particles", 2, "--output", tmp_path)
    assert (code, err) == (0, "") and "an adapter's classification head is loaded by vLLM 0.32" in out
    line = shlex.split(out[out.index("vllm serve") :].replace("\\\n", ""))
    head = ["--dtype", "float32", "--runner", "pooling", "--convert", "classify", "--max-lora-cls-labels", "3"]
    assert line[7:16] == [*head, "--enable-lora"]
    manifest = read_manifest(tmp_path)
    assert manifest.head_labels == 3
    with pytest.raises(UserError, match="the classification head of an encoder"):
        vllm_command(replace(manifest, head_labels=None), tmp_path)


def test_weights_that_are_no_numbers_are_not_exported(
    copied_run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = copied_run / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if ".lora_B." in name)[0, 0] = float("nan")
    save_file(tensors, file)
    record = replace(RunRecord.read(copied_run), adapter_sha256=sha256(file))
    record.write(copied_run)
    code, _, err = said(capfd, monkeypatch, copied_run, "--particles", 2)
    assert code == 2 and "has weights that are no numbers (NaN or infinite); train the run again." in err
    assert not (copied_run / "particles").exists()


def test_a_shell_reads_the_line_as_it_is_meant(scored_run: Path, tmp_path: Path) -> None:
    awkward = tmp_path / "it's, a $place"
    manifest = export(scored_run, 2, awkward)
    arguments = vllm_command(manifest, awkward / "particles", base="a base")
    script = as_shell(arguments).replace(
        "vllm", shlex.join([sys.executable, "-c", "import sys; print(sys.argv[1:])"]), 1
    )
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert told == f"{arguments[1:]}\n"
    # vLLM takes an item with a comma for JSON
    assert [json.loads(item) for item in arguments[-2:]] == [
        {"name": f"particle-{k}", "path": str(awkward / "particles" / str(k))} for k in range(2)
    ]


@pytest.mark.parametrize(("rank", "served"), [(1, 8), (8, 8), (9, 16), (64, 64), (300, 320), (512, 512)])
def test_the_rank_is_one_that_vllm_takes(scored_run: Path, tmp_path: Path, rank: int, served: int) -> None:
    manifest = replace(export(scored_run, 1, tmp_path), rank=rank)
    arguments = vllm_command(manifest, tmp_path)
    assert arguments[arguments.index("--max-lora-rank") + 1] == str(served)
    with pytest.raises(UserError, match="The rank is 513"):
        vllm_command(replace(manifest, rank=513), tmp_path)
    with pytest.raises(UserError, match="do not name their base model"):
        vllm_command(replace(manifest, base_model=None), tmp_path)
    with pytest.raises(UserError, match="The base model is called '--api-key=x', which vllm serve takes for an option"):
        vllm_command(replace(manifest, base_model="--api-key=x"), tmp_path)


def test_warnings_are_printed(
    copied_run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((copied_run / RECORD).read_text())
    (copied_run / RECORD).write_text(json.dumps(record | {"predictive": "linearized"}))
    _, out, _ = said(capfd, monkeypatch, copied_run, "--particles", 1)
    assert "warning: the run itself predicts linearised" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--particles", "0"), "The number of particles is 0"),
        (("--particles", "2", "--draws", "halton"), "There are no 'halton' draws"),
        ((), "Missing option '--particles'"),
    ],
)
def test_refusals_import_no_torch(scored_run: Path, arguments: tuple[str, ...], sentence: str) -> None:
    code = (
        "import atexit, sys; sys.argv[0] = 'scalabl'; from scalabl.cli import main;"
        "atexit.register(lambda: print('torch' in sys.modules)); main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "export", str(scored_run), *arguments], capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    assert sentence in ended.stderr and "Traceback" not in ended.stderr


def test_a_plain_run_is_refused_in_a_sentence(
    plain_run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = said(capfd, monkeypatch, plain_run, "--particles", 2)
    assert (code, out) == (2, "") and err.startswith("scalabl: ") and "is a plain LoRA without a posterior" in err
