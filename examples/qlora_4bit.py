"""QLoRA with a posterior: the base in 4 bit, questions answered by their letters, with probabilities and doubt.

    pip install bitsandbytes
    python examples/qlora_4bit.py --model Qwen/Qwen2.5-7B --output runs/qlora --steps 500

--data is a directory of train.jsonl and test.jsonl of {"question": ..., "choices": [...], "answer": ...} rows; the
default, ARC-Easy, is part of scalabl. Mean and sigma of the posterior stay float32.
"""

import argparse
from string import ascii_uppercase as LETTERS

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import scalabl
from scalabl.scoring import Letters


def prompt(row) -> str:
    choices = [f"{LETTERS[i]}. {choice}" for i, choice in enumerate(row.choices)]
    return "\n".join([f"Question: {row.question}", *choices, "Answer:"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="arc-easy")
    parser.add_argument("--output", default="runs/qlora")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=nf4, dtype=dtype, device_map="auto")
    tokenizer, task = AutoTokenizer.from_pretrained(args.model), scalabl.load_task(args.data)
    train, test = task.split("train"), task.split("test")[:20]
    rows = [{"prompt": prompt(row), "completion": f" {LETTERS[row.answer]}"} for row in train]
    adapter = scalabl.ScalaBLConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    settings = SFTConfig(args.output, max_steps=args.steps, bf16=torch.cuda.is_available(), save_strategy="no")
    trainer = SFTTrainer(base, settings, train_dataset=Dataset.from_list(rows), peft_config=adapter)
    trainer.add_callback(scalabl.ELBOCallback.for_tokens(trainer.train_dataset))
    trainer.train()
    trainer.model.save_pretrained(args.output)  # and args.output/mean, a plain LoRA

    scoring = Letters(tokenizer, labels=list(LETTERS[: max(len(row.choices) for row in test)]))
    answer = scalabl.Classifier(trainer.model.eval(), scoring, samples=10)([{"prompt": prompt(row)} for row in test])
    for i, row in enumerate(test):
        said = f"{answer.label[i]} at {answer.probs[i].max():.2f}, epistemic {answer.epistemic[i]:.3f}"
        print(f"{said}; right is {LETTERS[row.answer]}: {row.question}")


if __name__ == "__main__":
    main()
