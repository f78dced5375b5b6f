"""A plain LoRA that PEFT and Trainer have made, given a posterior afterwards: its answers stay, their doubt is new.

    python examples/bayesianize_existing.py --data tickets --output runs/existing

The first half is anybody's script, without scalabl; an adapter that you have already replaces it.
--data is a directory of train.jsonl and test.jsonl of {"text": ..., "label": ...} rows; mmlu-subjects, the default, is
part of scalabl.
"""

import argparse
import subprocess
import sys

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import scalabl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="mmlu-subjects")
    parser.add_argument("--output", default="runs/existing")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    plain, bayesian = f"{args.output}/plain", f"{args.output}/bayesian"

    task = scalabl.load_task(args.data)
    train, test = task.split("train"), [row.text for row in task.split("test")]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(task.labels))
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"]))
    rows = Dataset.from_list([{"text": row.text, "labels": row.answer} for row in train])
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=300), remove_columns="text")
    settings = TrainingArguments(
        plain, max_steps=args.steps, per_device_train_batch_size=16, learning_rate=1e-3, save_strategy="no",
    )  # fmt: skip
    Trainer(model, settings, train_dataset=rows, processing_class=tokenizer).train()
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)

    # no file of PEFT's has the names of the labels, so they are given in the order of the head's outputs
    labels = ["--labels", ",".join(task.labels)]
    command = [sys.executable, "-m", "scalabl", "bayesianize", plain, "--data", args.data, "--output", bayesian]
    subprocess.run([*command, *labels], check=True)

    before = scalabl.Classifier.from_pretrained(plain, labels=task.labels)(test)
    after = scalabl.Classifier.from_pretrained(bayesian)(test)
    same = sum(old == new for old, new in zip(before.label, after.label, strict=True))
    print(f"{same} of {len(test)} answers are the same")
    for part in ("entropy", "epistemic"):
        print(f"mean {part}: {getattr(before, part).mean():.3g} -> {getattr(after, part).mean():.3g} nats")


if __name__ == "__main__":
    main()
