"""A run shared on the Hub, with a card that says how well it is calibrated, and loaded again with and without scalabl.

    python examples/push_to_hub.py --output runs/shared --repo YOU/tickets     # after: hf auth login
    python examples/push_to_hub.py --output runs/shared                        # the same against a local directory

--data is a directory of train.jsonl and test.jsonl of {"text": ..., "label": ...} rows; mmlu-subjects, the default, is
part of scalabl.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, snapshot_download
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import scalabl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="mmlu-subjects")
    parser.add_argument("--output", default="runs/shared", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repo", help="YOU/NAME on the Hub; a directory beside the run if left out.")
    args = parser.parse_args()

    task = scalabl.load_task(args.data)
    test = [row.text for row in task.split("test")[:5]]
    train = ["train", "--model", args.model, "--data", args.data, "--output", args.output, "--steps", args.steps]
    for command in (train, ["card", args.output]):
        subprocess.run([sys.executable, "-m", "scalabl", *map(str, command)], check=True)
    if args.repo is None:
        shared = args.output.with_name(f"{args.output.name}-hub")
        shutil.copytree(args.output, shared, dirs_exist_ok=True)
    else:
        HfApi().create_repo(args.repo, exist_ok=True)
        HfApi().upload_folder(repo_id=args.repo, folder_path=args.output)
        shared = Path(snapshot_download(args.repo))

    card = ModelCard.load(shared / "README.md")
    print(f"{card.data.library_name}, {card.data.pipeline_tag}, on {card.data.base_model}: {', '.join(card.data.tags)}")
    answer = scalabl.Classifier.from_pretrained(shared, model=args.model)(test)
    print("with scalabl:", answer.label, "epistemic", answer.epistemic.round(3))
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(task.labels))
    plain = PeftModel.from_pretrained(base, shared / "mean")  # any tool that knows PEFT does this
    print("without:", type(plain).__name__, "of", sorted(plain.peft_config["default"].target_modules))


if __name__ == "__main__":
    main()
