"""Preferences with TRL: DPO and a reward model work, and GRPO is refused in one sentence.

    python examples/trl_reward_or_dpo.py --trainer Reward --data preferences.jsonl --output runs/reward

--data is a JSONL file of {"prompt": ..., "chosen": ..., "rejected": ...} rows; the default prefers ARC-Easy's right
choices, which are part of scalabl. DPO's reference answers by its mean; GRPO would compare the draws of two passes.
"""

import argparse

import torch
import trl
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import scalabl


def rows_of(data: str) -> Dataset:
    if data != "arc-easy":
        return load_dataset("json", data_files=data, split="train")
    rows = [(q.question, q.choices[q.answer], q.choices[q.answer - 1]) for q in scalabl.load_task(data).split("train")]
    return Dataset.from_list([{"prompt": q, "chosen": right, "rejected": wrong} for q, right, wrong in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainer", choices=("DPO", "Reward", "GRPO"), default="DPO")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="arc-easy")
    parser.add_argument("--output", default="runs/preferences")
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()

    rows = rows_of(args.data)
    if args.trainer == "Reward":
        task, base = "SEQ_CLS", AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1)
    else:
        task, base = "CAUSAL_LM", AutoModelForCausalLM.from_pretrained(args.model)
    more = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if args.trainer == "GRPO" else {}
    settings = getattr(trl, f"{args.trainer}Config")(args.output, max_steps=args.steps, bf16=False, save_strategy="no")
    more["peft_config"] = scalabl.ScalaBLConfig(task_type=task, target_modules=["q_proj", "v_proj"])
    trainer = getattr(trl, f"{args.trainer}Trainer")(base, args=settings, train_dataset=rows, **more)
    trainer.add_callback(scalabl.ELBOCallback(num_examples=len(rows)))
    try:
        trainer.train()
    except scalabl.UserError as refused:
        return print(f"refused: {refused}")
    trainer.model.save_pretrained(args.output)
    if args.trainer == "Reward":
        texts = [rows[0]["prompt"] + rows[0][name] for name in ("chosen", "rejected")]
        tokens = trainer.processing_class(texts * 10, padding=True, return_tensors="pt").to(trainer.model.device)
        with torch.no_grad(), scalabl.particles(trainer.model.eval(), 10, seed=0):  # row 2 i + j: text j, particle i
            rewards = trainer.model(**tokens).logits.view(10, 2)
        print("chosen, rejected:", rewards.mean(dim=0).tolist(), "+-", rewards.std(dim=0).tolist())


if __name__ == "__main__":
    main()
