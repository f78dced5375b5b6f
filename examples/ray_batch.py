"""Shards of rows answered by a pool of workers on Ray, and gone on with after any kill by the same command.

    pip install "scalabl[ray]"
    python examples/ray_batch.py --data tickets --shards s3://bucket/rows --output runs/batch --ray auto

--data is a directory of train.jsonl and test.jsonl of {"text": ..., "label": ...} rows; mmlu-subjects, the default, is
part of scalabl. Without --shards its test rows are written as shards; --ray local starts Ray on this machine.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import scalabl


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "scalabl", *map(str, arguments)], check=True)


def write_shards(rows: list, directory: Path, size: int = 100) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(rows), size):
        lines = [json.dumps({"id": row.id, "text": row.text}) + "\n" for row in rows[start : start + size]]
        (directory / f"{start // size:05}.jsonl").write_text("".join(lines))
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="mmlu-subjects")
    parser.add_argument("--output", default="runs/batch", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--shards", help="A file, a directory or a pattern; a path or an address such as s3://bucket/rows."
    )
    parser.add_argument("--ray", default="local", help="The cluster's address, auto or local.")
    args = parser.parse_args()

    test = list(scalabl.load_task(args.data).split("test"))
    adapter, answers = args.output / "run", args.output / "answers"
    if not (adapter / "scalabl.json").exists():
        run("train", "--model", args.model, "--data", args.data, "--output", adapter, "--steps", args.steps)
    shards = args.shards or write_shards(test, args.output / "shards")
    run("predict", adapter, "--input", shards, "--output", answers, "--ray", args.ray, "--samples", 10)
    for file in sorted(answers.glob("*.jsonl")):
        sure = [json.loads(line)["confidence"] for line in file.read_text().splitlines()]
        print(f"{file.name}: {len(sure)} rows, mean confidence {sum(sure) / len(sure):.3f}")


if __name__ == "__main__":
    main()
