"""Does a richer distribution between A and B pay: a mixture over the r numbers, or all r x r numbers of a core?

    python benchmarks/subspaces.py --study recipes/study.yaml

Trained here, in one loop for all, on the study's tasks with few rows (whose data the study's page names):

    plain       y = W0 x + (alpha/r) B A x
    diagonal    y = W0 x + (alpha/r) B diag(s) A x,   s ~ N(mu, diag(sigma^2))                      [ScalaBL]
    mixture     s ~ 1/K sum_k N(mu_k, diag(sigma_k^2)); a row of a batch is of one component, and so is a particle
                [rank-1 Bayesian networks, Dusenberry et al. 2020; BatchEnsemble, Wen et al. 2020]
    core        y = W0 x + (alpha/r) B S A x,   S (r, r) with N(mu, sigma^2) on each number           [LoRA-XS's core]

The mixture's KL is bounded by that of its components, KL(q || p) <= 1/K sum_k KL(q_k || p). Means begin at the singular
values of A: a mixture's with a random sign each ("signs") or times exp(0.5 normal), a core's off its diagonal at zero.
"averaged": A, B and the head are the mean over the last third of the steps. "heads": a head of its own for each
component. All at one budget (rate, steps, batch, rows, particles); NLL with the temperature that suits it.

And after training, of the plain LoRA with B A = U diag(sv) V^T, the exact joint Laplace posterior of r or of r x r
numbers around the identity, B := U sqrt(sv), A := sqrt(sv) V^T, with the prior precision that validation rows choose of
multiples of the evidence's and the linearised predictive, where classes are few.

Variants are compared on validation rows, and on test rows those that are named by --tested. Writes
docs/results/NAME.{json,md}. Figures are kept a run at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from harness import RESULTS, digest, facts, kept, markdown_facts, options, table, write_results
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup, set_seed

from scalabl.core.console import quiet
from scalabl.core.modules import eval_mode
from scalabl.data.assemble import select_rows
from scalabl.data.load import load_task, rows_of
from scalabl.metrics.calibration import row_losses
from scalabl.metrics.uncertainty import average, fit_temperature
from scalabl.predictive.linearized import LinearizedPredictive
from scalabl.runs.method import load_method
from scalabl.runs.models import load_base
from scalabl.runs.settings import Settings
from scalabl.scoring.base import Batch, Encoded
from scalabl.scoring.likelihood import log_likelihood
from scalabl.scoring.scorer import Scorer
from scalabl.scoring.trunk import Trunk, token_logits
from scalabl.scoring.trunk_store import with_stored_trunk
from scalabl.study.study import read_study
from scalabl.training.choose_scoring import candidates
from scalabl.training.posthoc.laplace import JointCurvature, posterior_of
from scalabl.training.posthoc.precision import index_of_best, tried_precisions
from scalabl.training.trainer import LengthGroupedOrder

PRIOR_MEAN = 0.577  # of s: where LoRA's draw puts it
SPREAD = 0.5  # between the components of a mixture that begin near each other
OFF_DIAGONAL = 8**-0.5  # the noise off a core's diagonal, beside that on it: r of them make one number's


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Attributes:
        kind: "plain", "diagonal", "mixture" or "core".
        components: K.
        signs: whether the components begin with random signs, or near each other.
        averaged: whether the point estimates are averaged over the last third of the steps.
        heads: whether each component has a head.
        faster: the rate of A, B and the head is so many times the others'.
        width: standard deviation of the prior on s, whose posterior begins half as wide.
    """

    kind: str
    components: int = 1
    signs: bool = True
    averaged: bool = False
    heads: bool = False
    faster: float = 1.0
    width: float = 0.2

    @property
    def name(self) -> str:
        parts = [self.kind if self.kind != "mixture" else f"mixture of {self.components}"]
        if self.kind == "mixture":
            parts.append("signs" if self.signs else "near")
        parts += [word for word in ("averaged", "heads") if getattr(self, word)]
        return ", ".join(parts + ([f"rate x {self.faster:g}"] if self.faster != 1 else []))


VARIANTS = (
    Variant("plain"),
    Variant("diagonal"),
    Variant("mixture", 4),
    Variant("mixture", 4, signs=False),
    Variant("mixture", 4, faster=2),
    Variant("mixture", 4, heads=True),
    Variant("core"),
    Variant("plain", averaged=True),
    Variant("diagonal", averaged=True),
    Variant("mixture", 4, signs=False, averaged=True),
)


class Between(nn.Module):
    """diag(s) A or S A, in the place of LoRA's A; s (K, r) or S (r, r) Gaussian."""

    def __init__(self, weight: Tensor, variant: Variant) -> None:
        super().__init__()
        _, singular_values, rows = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        r, k = len(singular_values), variant.components
        # at LoRA's length, by which Adam turns it as far
        self.direction = nn.Parameter(singular_values[:, None] * rows)
        self.variant = variant
        self.noise: Tensor | None = None  # of the particle that all rows carry; None draws, or is the mean if eval
        self.rows_of: Tensor | None = None  # the component of each row
        if variant.kind == "core":
            diagonal = torch.eye(r)
            self.mean = nn.Parameter(torch.diag(singular_values))
            self.register_buffer("prior_mean", PRIOR_MEAN * diagonal)
            self.register_buffer("prior_std", variant.width * (diagonal + OFF_DIAGONAL * (1 - diagonal)))
            self.log_std = nn.Parameter((self.prior_std / 2).log())
        else:
            begin = singular_values.repeat(k, 1)
            signs = torch.where(torch.rand(k, r) < 0.5, -1.0, 1.0) if variant.signs and k > 1 else torch.ones(k, r)
            spread = torch.ones(k, r) if variant.signs or k == 1 else (SPREAD * torch.randn(k, r)).exp()
            self.mean = nn.Parameter(begin * signs * spread)
            self.log_std = nn.Parameter(torch.full((k, r), variant.width / 2).log())
            self.register_buffer("prior_mean", PRIOR_MEAN * signs)
            self.register_buffer("prior_std", torch.full((k, r), variant.width))

    @property
    def weight(self) -> Tensor:
        """What PEFT reads the dtype of."""
        return self.direction

    def kl(self) -> Tensor:
        """KL(q || p) in nats; of a mixture its bound."""
        variance, prior = (2 * self.log_std).exp(), self.prior_std**2
        each = self.prior_std.log() - self.log_std + (variance + (self.mean - self.prior_mean) ** 2) / (2 * prior) - 0.5
        return each.sum() / self.variant.components

    def forward(self, x: Tensor) -> Tensor:
        projected = F.linear(x, F.normalize(self.direction, dim=1))
        if self.variant.kind == "plain":
            return projected * self.mean[0]
        noise = self.noise
        if noise is None:
            noise = torch.randn(len(x), *self.mean.shape[-1:]) if self.variant.kind != "core" else None
        std = self.log_std.exp()
        if self.variant.kind == "core":
            drawn = torch.randn(len(x), *self.mean.shape) if noise is None else noise.expand(len(x), *self.mean.shape)
            return torch.einsum("btj,bij->bti", projected, self.mean + std * drawn)
        of = torch.zeros(len(x), dtype=torch.long) if self.rows_of is None else self.rows_of
        s = self.mean[of] + std[of] * noise
        return projected * s[:, None]


class Heads(nn.Module):
    """The output layer of each component; a row goes through its own."""

    def __init__(self, head: nn.Linear, components: int) -> None:
        super().__init__()
        made = [nn.Linear(head.in_features, head.out_features) for _ in range(components)]
        self.each = nn.ModuleList(made)
        self.rows_of: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.rows_of is not None
        every = torch.stack([head(x) for head in self.each])
        return every[self.rows_of, torch.arange(len(x))]


class Experiment:
    """A task's rows and a fresh model for each variant."""

    def __init__(self, settings: Settings, test_rows: int) -> None:
        self.settings = settings
        self.task = load_task(settings.data)
        rows = select_rows(self.task, settings.rows)
        self.parts = {"train": rows.train, "validation": rows.validation}
        self.parts["test"] = tuple(rows_of(settings.data, split="test", limit=test_rows))
        self.encoded: dict[str, list[Encoded]] = {}

    def model(self, variant: Variant, seed: int) -> tuple[Scorer, list[Between]]:
        set_seed(seed)
        model, tokenizer = load_base(self.settings.model, **self.settings.machine.of_base, labels=self.task.labels)
        scoring = candidates(self.settings, tokenizer, self.parts["train"], self.task.labels, head=True)[-1]
        set_seed(seed)
        adapted = get_peft_model(model, load_method("mle").adapter_config(self.settings, model))
        leaves = []
        for module in list(adapted.modules()):
            if isinstance(module, LoraLayer) and "default" in module.lora_A:
                leaf = Between(module.lora_A["default"].weight, variant)
                module.lora_A["default"] = leaf
                leaves.append(leaf)
        scorer = Scorer(adapted, scoring, Trunk(adapted))
        if not self.encoded:
            for part, rows in self.parts.items():
                self.encoded[part] = with_stored_trunk(scorer, [scoring.encode(row) for row in rows], batch_size=32)
        if variant.heads:
            parent = adapted.base_model.model.classifier.modules_to_save
            parent["default"] = Heads(parent["default"], variant.components)
        return scorer, leaves


def train(scorer: Scorer, leaves: list[Between], rows: list[Encoded], settings: Settings, seed: int) -> None:
    """The ELBO by AdamW, with the study's schedule."""
    variant, optimisation = leaves[0].variant, settings.optimisation
    own = [p for leaf in leaves for p in (leaf.mean, leaf.log_std)]
    others = [p for p in scorer.model.parameters() if p.requires_grad and all(p is not each for each in own)]
    groups = [
        {"params": others, "lr": variant.faster * optimisation.learning_rate},
        {"params": own, "lr": settings.posterior.variational_learning_rate if variant.kind != "plain" else 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-6, weight_decay=0.0)
    steps = optimisation.steps
    schedule = get_linear_schedule_with_warmup(optimizer, int(optimisation.warmup * steps), steps)
    order = LengthGroupedOrder([len(row.input_ids) for row in rows], optimisation.batch_size, seed=seed)
    batches = _batches(order, optimisation.batch_size, len(rows))
    sums: list[Tensor] | None = None
    scorer.model.train()
    for step in range(steps):
        chunk = [rows[i] for i in next(batches)]
        batch = scorer.scoring.collate(chunk)
        _components(scorer, leaves, torch.randint(variant.components, (len(chunk),)))
        logits = token_logits(scorer.model, batch, scorer.trunk, scorer.scoring.positions(batch))
        loss = scorer.scoring.likelihood.loss(scorer.scoring.class_logits(logits, batch), batch.answers)
        kl = torch.stack([leaf.kl() for leaf in leaves]).sum() / len(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(
            [p for p in scorer.model.parameters() if p.grad is not None], optimisation.max_grad_norm
        )
        if variant.kind != "plain":
            kl.backward()
        optimizer.step()
        schedule.step()
        if variant.averaged and step >= 2 * steps // 3:
            with torch.no_grad():
                if sums is None:
                    sums = [torch.zeros_like(p) for p in others]
                for total, p in zip(sums, others, strict=True):
                    total += p / (steps - 2 * steps // 3)
    if sums is not None:
        with torch.no_grad():
            for total, p in zip(sums, others, strict=True):
                p.copy_(total)


def _batches(order: LengthGroupedOrder, size: int, rows: int) -> Iterator[list[int]]:
    for epoch in itertools.count():
        order.set_epoch(epoch)
        listed = list(order)
        for start in range(0, rows - size + 1, size):
            yield listed[start : start + size]


def _components(scorer: Scorer, leaves: list[Between], rows_of: Tensor) -> None:
    for leaf in leaves:
        leaf.rows_of = rows_of
    for module in scorer.model.modules():
        if isinstance(module, Heads):
            module.rows_of = rows_of


@torch.no_grad()
def predict(scorer: Scorer, leaves: list[Between], rows: list[Encoded], samples: int, seed: int) -> Tensor:
    """(N, n, C) log class probabilities; of a plain LoRA (1, n, C)."""
    variant = leaves[0].variant
    number = 1 if variant.kind == "plain" else samples
    generator = torch.Generator().manual_seed(seed)
    shape = leaves[0].mean.shape if variant.kind == "core" else leaves[0].mean.shape[-1:]
    found = torch.empty(number, len(rows), 0)
    with eval_mode(scorer.model):
        for n in range(number):
            for leaf in leaves:
                leaf.noise = torch.randn(shape, generator=generator)
            for indices, chunk in scorer.batches(rows, 32):
                batch = scorer.scoring.collate(chunk)
                _components(scorer, leaves, torch.full((len(chunk),), n % variant.components))
                log_probs = scorer.class_log_probs(batch)
                if found.shape[2] == 0:
                    found = torch.empty(number, len(rows), log_probs.shape[1])
                found[n, indices] = log_probs
    for leaf in leaves:
        leaf.noise = leaf.rows_of = None
    return found


def figures(log_probs: Tensor, labels: Tensor, temperature: float | None = None) -> dict[str, float]:
    """NLL in nats with a temperature, the one that suits the rows if none is given, and accuracy in percent."""
    t = fit_temperature(log_probs, labels) if temperature is None else temperature
    right = (average(log_probs).argmax(dim=-1) == labels).float().mean().item()
    return {"nll": row_losses(log_probs, labels, t).mean().item(), "accuracy": 100 * right, "temperature": t}


class _Core(nn.Module):
    """S A with S given for each row: what the logits are differentiated by."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows
        self.given: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        projected = F.linear(x, self.rows)
        return projected if self.given is None else torch.einsum("btj,bij->bti", projected, self.given)


@contextmanager
def _balanced(scorer: Scorer) -> Iterator[list[_Core]]:
    """The plain LoRA in other factors, B := U sqrt(sv) and A := sqrt(sv) V^T."""
    made, before = [], []
    for module in scorer.model.modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            leaf, up = module.lora_A["default"], module.lora_B["default"]
            down = leaf.mean[0].detach()[:, None] * F.normalize(leaf.direction.detach(), dim=1)
            q_up, r_up = torch.linalg.qr(up.weight.detach())
            q_down, r_down = torch.linalg.qr(down.T)
            u, values, v = torch.linalg.svd(r_up @ r_down.T)
            core = _Core((q_down @ (v.T * values.sqrt())).T)
            before.append((module, leaf, up.weight.data))
            up.weight.data = (q_up @ u) * values.sqrt()
            module.lora_A["default"] = core
            made.append(core)
    try:
        yield made
    finally:
        for module, leaf, weight in before:
            module.lora_A["default"], module.lora_B["default"].weight.data = leaf, weight


def laplace(scorer: Scorer, train_rows: list[Encoded], rows: dict[str, list[Encoded]]) -> dict[str, dict[str, Any]]:
    """ "r" and "r x r" -> part -> log class probabilities (points, n, C) of the linearised predictive."""
    with _balanced(scorer) as cores, eval_mode(scorer.model):
        r = len(cores[0].rows)

        def jacobian(batch: Batch) -> tuple[Tensor, Tensor]:
            for core in cores:
                core.given = torch.eye(r).repeat(len(batch), 1, 1).requires_grad_()
            logits = scorer.class_logits(batch)
            contrasts = [
                torch.cat([g.flatten(1) for g in torch.autograd.grad(
                    logits[:, c].sum(), [core.given for core in cores], retain_graph=c + 1 < logits.shape[1]
                )], dim=1)
                for c in range(logits.shape[1])
            ]  # fmt: skip
            return logits.detach(), torch.stack(contrasts, dim=1)

        size, total, likelihood = len(cores) * r * r, 0.0, scorer.scoring.likelihood
        matrix = torch.zeros(size, size, dtype=torch.float64)
        for _, batch in scorer.encoded_batches(train_rows, 16):
            logits, each = jacobian(batch)
            root = likelihood.curvature_root(logits.double())
            weighted = torch.einsum("bck,bcd->bkd", root, each.double()).flatten(0, 1)
            matrix.addmm_(weighted.T, weighted)
            total += log_likelihood(likelihood, logits, batch.answers).item()
        diagonal = torch.cat([torch.eye(r).flatten().bool()] * len(cores))
        linearized = LinearizedPredictive()
        found: dict[str, dict[str, Any]] = {}
        for name, kept_ in (("r", diagonal), ("r x r", torch.ones_like(diagonal))):
            own = matrix[kept_][:, kept_]
            curvature, used = JointCurvature(own, {name: len(own)}, total, len(train_rows)), int(diagonal.sum())
            tried = tried_precisions(posterior_of(curvature, used)[1]["prior_precision"])
            factors = [posterior_of(curvature, used, precision)[0].factor for precision in tried]

            def predictions(batch: Batch, of: Sequence[Tensor] = factors, kept_: Tensor = kept_) -> Iterator[Tensor]:
                logits, each = jacobian(batch)
                halves = ((each[:, 1:, kept_] - each[:, :1, kept_]) @ factor for factor in of)
                return (linearized.log_probs(logits, half @ half.mT, likelihood) for half in halves)

            chosen = factors[index_of_best(scorer, rows["validation"], predictions, batch_size=16)]
            for part, listed in rows.items():
                for indices, batch in scorer.encoded_batches(listed, 16):
                    (drawn,) = predictions(batch, [chosen])
                    blank = torch.empty(len(drawn), len(listed), drawn.shape[2])
                    found.setdefault(name, {}).setdefault(part, blank)[:, indices] = drawn.float()
        for core in cores:
            core.given = None
        return found


def run(experiment: Experiment, variant: Variant, seed: int, samples: int, tested: bool, few: int) -> dict[str, Any]:
    """Validation (and test) figures of a variant, and of the Laplace posteriors of a plain LoRA of few classes."""
    scorer, leaves = experiment.model(variant, seed)
    train(scorer, leaves, experiment.encoded["train"], experiment.settings, seed)
    parts = {part: experiment.encoded[part] for part in (("validation", "test") if tested else ("validation",))}
    labels = {part: torch.tensor([row.answer for row in experiment.parts[part]]) for part in parts}
    drawn = {part: predict(scorer, leaves, rows, samples, seed) for part, rows in parts.items()}

    def of(log_probs: dict[str, Tensor]) -> dict[str, Any]:
        made = {"validation": figures(log_probs["validation"], labels["validation"])}
        if tested:
            made["test"] = figures(log_probs["test"], labels["test"], made["validation"]["temperature"])
        return made

    made = {variant.name: of(drawn)}
    if variant == VARIANTS[0] and len(experiment.task.labels or ()) <= few:
        found = laplace(scorer, experiment.encoded["train"], parts)
        made |= {f"Laplace, {name}": of(log_probs) for name, log_probs in found.items()}
    return made


def page(runs: dict[str, dict[str, dict[str, dict[str, Any]]]], part: str) -> str:
    """A table: each variant's NLL task by task, and over all runs minus that of plain LoRA and of the diagonal."""
    every = [of for seeds in runs.values() for of in seeds.values()]
    rows = []
    for name in dict.fromkeys(name for of in every for name in of if part in of[name]):
        row: dict[str, Any] = {"name": name}
        for task, seeds in runs.items():
            known = [of[name][part]["nll"] for of in seeds.values() if part in of.get(name, {})]
            row[task] = f"{mean(known):.3f}" if known else "–"
        both = [of for of in every if part in of.get(name, {})]
        for other in ("plain", "diagonal"):
            gaps = [of[name][part]["nll"] - of[other][part]["nll"] for of in both if part in of.get(other, {})]
            row[other] = f"{mean(gaps):+.3f}, {sum(gap < 0 for gap in gaps)} of {len(gaps)}" if gaps else "–"
        row["accuracy"] = f"{mean(of[name][part]['accuracy'] - of['plain'][part]['accuracy'] for of in both):+.1f}"
        rows.append(row)
    return table(
        rows, ("variant", "{name}"), *((task, f"{{{task}}}") for task in runs), ("minus plain, lower in", "{plain}"),
        ("minus diagonal, lower in", "{diagonal}"), ("accuracy % minus plain", "{accuracy}"),
    )  # fmt: skip


def of_seed(settings: Settings, where: Path, a: Any) -> dict[str, dict[str, Any]]:
    """The figures of every variant on a task under a seed, kept one by one."""
    made: list[Experiment] = []
    found: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        if variant.name not in a.variants:
            continue
        tested = variant.name in a.tested
        made_from = [settings.as_dict(), asdict(variant), a.samples, tested, a.test_rows, a.few_classes]

        def make(variant: Variant = variant, tested: bool = tested) -> dict[str, Any]:
            if not made:
                made.append(Experiment(settings, a.test_rows))
            return run(made[0], variant, settings.seed, a.samples, tested, a.few_classes)

        path = where / f"{digest(made_from)}.json"
        found |= kept(path, lambda made_from=made_from: made_from, make)
        best = ", ".join(f"{name} {of['validation']['nll']:.3f}" for name, of in found.items())
        print(f"{settings.data}, seed {settings.seed}, NLL of validation rows: {best}", flush=True)
    return found


def main() -> None:
    few = ["clinc150-few", "banking77-few", "trec6-few", "sst2-few", "mmlu-subjects-few"]
    a = options(
        __doc__, study="recipes/study.yaml", tasks=few, seeds=[0, 1], samples=12, learning_rate=2e-3, test_rows=500,
        few_classes=20, runs="runs/subspaces", tested=["plain", "diagonal"], variants=[each.name for each in VARIANTS],
        name="subspaces", output=RESULTS,
    ).parse_args()  # fmt: skip
    quiet()
    study = read_study(Path(a.study))
    scalabl = next(variant for variant in study.variants if variant.method == "scalabl")
    runs: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for task, seed in itertools.product(a.tasks, a.seeds):
        settings = study.training_settings(scalabl, task, seed, {"learning_rate": a.learning_rate})
        runs.setdefault(task, {})[str(seed)] = of_seed(settings, Path(a.runs), a)
    noted = facts(
        model=study.model, data="; ".join(a.tasks), seeds=", ".join(map(str, a.seeds)),
        training=f"steps as there, rate {a.learning_rate:g}, N = {a.samples}; N({PRIOR_MEAN}, {VARIANTS[1].width}^2)",
    )  # fmt: skip
    parts = ["# Richer distributions between A and B", "NLL in nats with a temperature, means over seeds."]
    parts += ["## Validation rows", page(runs, "validation"), "## Test rows", page(runs, "test")]
    write_results(Path(a.output), a.name, {"facts": noted, "runs": runs}, "\n\n".join([*parts, markdown_facts(noted)]))


if __name__ == "__main__":
    main()
