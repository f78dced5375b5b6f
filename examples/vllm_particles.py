"""A Bayesian language model served by vLLM: its particles exported as plain LoRAs, and the line that serves them.

    python examples/vllm_particles.py --output runs/served                               # prints the vllm serve line
    python examples/vllm_particles.py --output runs/served --url http://127.0.0.1:8000   # asks the server

The server needs nothing of scalabl. --data is a JSONL file, or a directory of train.jsonl and test.jsonl, of
{"question": ..., "choices": [...], "answer": ...} rows; the default, ARC-Easy, is part of scalabl.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import scalabl


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "scalabl", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="arc-easy")
    parser.add_argument("--output", default="runs/served", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--url", help="Of the server, once it runs.")
    args = parser.parse_args()

    if args.url is None:
        run("train", "--model", args.model, "--data", args.data, "--output", args.output, "--steps", args.steps)
        run("export", args.output, "--particles", args.particles)
        return
    test = scalabl.load_task(args.data).split("test")[:20]
    answer = scalabl.VLLMClassifier.from_export(args.output, url=args.url)(test)
    for row, label, probs, epistemic in zip(test, answer.label, answer.probs, answer.epistemic, strict=True):
        print(f"{label} at {probs.max():.2f} (epistemic {epistemic:.3f}): {row.question}")


if __name__ == "__main__":
    main()
