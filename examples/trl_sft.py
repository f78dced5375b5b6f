"""A language model fine-tuned with TRL's SFTTrainer, and answers with the doubt of every token.

    python examples/trl_sft.py --data rows.jsonl --output runs/sft

--data is a JSONL file of {"prompt": ..., "completion": ...} rows; the default asks ARC-Easy's questions, which are
part of scalabl, without their choices. Packing is refused: a draw of the posterior belongs to a text.
"""

import argparse

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import scalabl
from scalabl.generation import decode
from scalabl.predictive import MonteCarloPredictive


def rows_of(data: str) -> Dataset:
    if data != "arc-easy":
        return load_dataset("json", data_files=data, split="train")
    questions = scalabl.load_task(data).split("train")
    rows = [(f"Question: {row.question}\nAnswer:", f" {row.choices[row.answer]}") for row in questions]
    return Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="arc-easy")
    parser.add_argument("--output", default="runs/sft")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()

    adapter = scalabl.ScalaBLConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    settings = SFTConfig(
        args.output, max_steps=args.steps, per_device_train_batch_size=8, learning_rate=1e-3, bf16=False,
        gradient_checkpointing=False, save_strategy="no",
    )  # fmt: skip
    base, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    rows = rows_of(args.data)
    trainer = SFTTrainer(base, settings, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    # its loss is a mean over tokens, so the KL is weighed by their number
    trainer.add_callback(scalabl.ELBOCallback.for_tokens(trainer.train_dataset))
    trainer.train()
    trainer.model.save_pretrained(args.output)  # and args.output/mean, a plain LoRA

    particles = MonteCarloPredictive(samples=10, seed=0)
    for [answer] in decode(trainer.model, tokenizer, rows["prompt"][:3], particles, max_new_tokens=20):
        doubts = zip(answer.tokens, answer.epistemic.tolist(), strict=True)
        print(f"{answer.prompt}{answer.text}")
        print("    epistemic:", ", ".join(f"{token!r} {doubt:.2g}" for token, doubt in doubts))


if __name__ == "__main__":
    main()
