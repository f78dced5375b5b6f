"""Active learning: each round labels the rows about which the posterior's particles disagree most (BALD).

    python examples/active_learning.py --data tickets --output runs/active --rounds 4 --label 20

--data is a directory of train.jsonl and test.jsonl of {"text": ..., "label": ...} rows; mmlu-subjects, the default, is
part of scalabl. The labels of train.jsonl stand in for a person: only those of chosen rows are read.
"""

import argparse
import random

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import scalabl


def trained(args: argparse.Namespace, tokenizer, labels, rows) -> scalabl.Classifier:
    """A classifier trained anew on the rows labelled so far."""
    base = AutoModelForSequenceClassification.from_pretrained(args.model, id2label=dict(enumerate(labels)))
    config = scalabl.ScalaBLConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config)
    tokens = tokenizer([row.text for row in rows], truncation=True, max_length=300)
    tokens = Dataset.from_dict({**tokens, "labels": [row.answer for row in rows]})
    settings = TrainingArguments(args.output, max_steps=args.steps, learning_rate=1e-3, save_strategy="no")
    elbo = [scalabl.ELBOCallback(num_examples=len(rows))]
    Trainer(model, settings, train_dataset=tokens, processing_class=tokenizer, callbacks=elbo).train()
    model.save_pretrained(args.output)
    return scalabl.Classifier(model.eval(), tokenizer, samples=10, predictive="mc")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="mmlu-subjects")
    parser.add_argument("--output", default="runs/active")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--label", type=int, default=40, help="Rows a round.")
    args = parser.parse_args()

    task, tokenizer = scalabl.load_task(args.data), AutoTokenizer.from_pretrained(args.model)
    pool, test = (random.Random(0).sample(rows, len(rows)) for rows in map(task.split, ("train", "test")))
    test = test[:200]
    labelled = [pool.pop() for _ in range(args.label)]
    for number in range(args.rounds):
        classifier = trained(args, tokenizer, task.labels, labelled)
        answer = classifier([row.text for row in test])
        right = sum(label == row.choices[row.answer] for label, row in zip(answer.label, test, strict=True))
        print(f"round {number}: {len(labelled)} labelled rows, {right / len(test):.1%} of the test rows right")
        disagreement = classifier([row.text for row in pool]).epistemic
        chosen = set(disagreement.argsort()[::-1][: args.label].tolist())
        labelled += [pool[i] for i in chosen]
        pool = [row for i, row in enumerate(pool) if i not in chosen]


if __name__ == "__main__":
    main()
