"""Many threads on one `Classifier`: every answer is that of one thread alone, and memory stays where it was.

Each thread asks groups of prompts of unequal lengths, by particles, by the mean behind a common prefix and by the
linearised predictive; one more thread passes the model plainly meanwhile. Results: docs/results/campaign/threads.json
and .md.

    python scripts/campaign/threads.py --threads 24 --seconds 300
"""

from __future__ import annotations

import gc
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from parts import offline, write

from harness import options, table  # isort: skip

LABELS = ["yes", "no", "red"]
PREFIX = "Answer with one word of three. " * 4
PROMPTS = [("word " * (1 + 7 * i % 23)) + f"number {i}\nLabel:" for i in range(24)]
FORMS: dict[str, dict[str, Any]] = {
    "mc, N = 4": {"predictive": "mc", "samples": 4},
    "mean behind a prefix": {"samples": 0, "prefix": PREFIX},
    "linearised": {"predictive": "linearized"},
}


def memory() -> float:
    """Resident memory of this process, MiB."""
    import psutil

    gc.collect()
    return float(psutil.Process().memory_info().rss) / 2**20


class Askers:
    """Threads that ask classifiers on one model, and what differed.

    Args:
        model: a PEFT model.
        tokenizer: its own.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        import torch

        from scalabl.inference.classifier import Classifier
        from scalabl.scoring.letters import Letters

        scoring = Letters(tokenizer, labels=LABELS, template="{text}")
        self.model = model
        self.inputs = torch.arange(3, 43).view(2, 20)
        self.classifiers = {name: Classifier(model, scoring, **form) for name, form in FORMS.items()}
        self.groups = [PROMPTS[i : i + 1 + i % 4] for i in range(0, len(PROMPTS), 2)]
        self.expected = {
            name: [asked(group).particle_log_probs for group in self.groups] for name, asked in self.classifiers.items()
        }
        self.plain = self.plainly()
        self.calls = dict.fromkeys((*FORMS, "plain passes"), 0)
        self.faults: list[str] = []
        self.over = threading.Event()
        self._lock = threading.Lock()

    def plainly(self) -> Any:
        """The model's own logits."""
        import torch

        with torch.no_grad():
            return self.model(input_ids=self.inputs).logits

    def note(self, name: str, fault: str | None) -> None:
        """Count a call, and keep what was wrong with it."""
        with self._lock:
            self.calls[name] += 1
            if fault:
                self.faults.append(f"{name}: {fault}")

    def ask(self, number: int) -> None:
        """Ask until the time is over."""
        names = list(FORMS)
        for turn in range(10**9):
            if self.over.is_set():
                return
            name, at = names[(number + turn) % len(names)], (number + turn) % len(self.groups)
            try:
                found = self.classifiers[name](self.groups[at]).particle_log_probs
                same = found.shape == self.expected[name][at].shape and (found == self.expected[name][at]).all()
                self.note(name, None if same else "another answer")
            except Exception as error:
                self.note(name, f"{type(error).__name__}: {error}")

    def pass_plainly(self) -> None:
        """Pass the model as it is until the time is over."""
        while not self.over.is_set():
            try:
                self.note("plain passes", None if (self.plainly() == self.plain).all() else "other logits")
            except Exception as error:
                self.note("plain passes", f"{type(error).__name__}: {error}")
            time.sleep(0.01)


def main() -> None:
    """Ask for some time, and write what came of it."""
    chosen = options(
        __doc__, threads=(24, "that ask"), seconds=(300, "how long"), results=("yes", "write them", ("yes", "no"))
    ).parse_args()
    with tempfile.TemporaryDirectory() as name, offline(Path(name)):
        from tiny_base import adapted, loaded

        asked = Askers(adapted(layers=4, last=2), loaded()[1])
        threads = [threading.Thread(target=asked.ask, args=(number,)) for number in range(chosen.threads)]
        threads.append(threading.Thread(target=asked.pass_plainly))
        for thread in threads:
            thread.start()
        time.sleep(min(10, chosen.seconds / 4))  # arenas of the threads, caches of the prefix
        found = [memory()]
        ends = time.monotonic() + chosen.seconds
        while time.monotonic() < ends:
            time.sleep(max(0.1, chosen.seconds / 20))
            found.append(memory())
        asked.over.set()
        for thread in threads:
            thread.join()
        if not (asked.plainly() == asked.plain).all():
            asked.faults.append("the plain pass afterwards gives other logits")
    grown = found[-1] - found[0]
    rows = [{"of": of, "calls": calls} for of, calls in asked.calls.items()]
    page = f"""# Threads

{chosen.threads} threads on one model for {chosen.seconds} s, and one that passes it plainly: every answer bit for bit
that of one thread alone, and the plain pass the same during and afterwards. Faults: {len(asked.faults)}. Memory
{found[0]:,.0f} MiB after the first seconds, {found[-1]:,.0f} MiB in the end ({grown:+.1f} MiB).

{table(rows, ("of", "{of}"), ("calls", "{calls:,}"))}
"""
    if chosen.results == "yes":
        content = {"calls": asked.calls, "faults": asked.faults, "memory_mib": [round(each, 1) for each in found]}
        write("threads", content, page)
    else:
        print(page)
    for fault in asked.faults[:5]:
        print(fault, file=sys.stderr)
    sys.exit(1 if asked.faults else 0)


if __name__ == "__main__":
    main()
