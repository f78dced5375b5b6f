"""An encoder fine-tuned with Transformers' Trainer, whose answers come with their doubt.

    python examples/trainer_classification.py --data tickets --output runs/tickets

--data is a directory of train.jsonl and test.jsonl of {"text": ..., "label": ...} rows, or a name that scalabl knows:
mmlu-subjects, the default, comes with it.
"""

import argparse

from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import scalabl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="mmlu-subjects")
    parser.add_argument("--output", default="runs/classification")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()

    task = scalabl.load_task(args.data)
    train, test = task.split("train"), task.split("test")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    names = dict(enumerate(task.labels))
    base = AutoModelForSequenceClassification.from_pretrained(
        args.model, id2label=names, label2id={label: i for i, label in names.items()}
    )
    config = scalabl.ScalaBLConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(base, config)

    rows = Dataset.from_list([{"text": row.text, "labels": row.answer} for row in train])
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=300), remove_columns="text")
    settings = TrainingArguments(
        args.output, max_steps=args.steps, per_device_train_batch_size=16, learning_rate=1e-3, save_strategy="no",
    )  # fmt: skip
    elbo = scalabl.ELBOCallback(num_examples=len(rows))  # the one line that a plain LoRA does not have
    Trainer(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[elbo]).train()

    model.save_pretrained(args.output)  # and args.output/mean, a plain LoRA
    model.config.save_pretrained(args.output)  # the names of the labels
    tokenizer.save_pretrained(args.output)

    answer = scalabl.Classifier.from_pretrained(args.output, samples=10)([row.text for row in test])
    right = [label == row.choices[row.answer] for label, row in zip(answer.label, test, strict=True)]
    print(f"{sum(right)} of {len(right)} right")
    for i in answer.epistemic.argsort()[::-1][:3]:  # what it has learnt too little of
        print(f"{answer.label[i]}, epistemic {answer.epistemic[i]:.3f} of {answer.entropy[i]:.3f} nats: {test[i].text}")


if __name__ == "__main__":
    main()
