"""What is compared: every method by its name, and what is known of it before its file is imported. Imports no torch.

A trained method has a training run of its own (`scalabl train --method NAME`); a post-hoc method is fitted on the
finished run of another, and its files lie in that run's directory. `scalabl.runs.method` has the interface.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Traits:
    """What a method is, as far as code needs to know that does not run it.

    Attributes:
        title: as in a table.
        source: "file:Class" in `scalabl.methods`.
        post_hoc: fitted on a finished run, not trained.
        sampled: its predictive averages over N particles, each a forward pass of its own.
        logit_draws: its predictive draws N times from a distribution of the logits, which costs no pass.
        over_s: its posterior is over s: the linearised predictive, other draws and a choice of layers are for it.
        plain_lora: its adapter is a plain LoRA, on which a post-hoc method can be fitted.
        variational: trained with a KL: the posterior's settings are its own, it sees to its noise over ranks itself,
            and it needs gradients that DeepSpeed hides.
        shardable: trained under FSDP 2.
        members: made of the runs of several seeds.
        plannable: whether memory and time of a run can be worked out without its numbers.
        settings: its own, where they are not the defaults; what is given explicitly wins.
    """

    title: str
    source: str
    post_hoc: bool = False
    sampled: bool = False
    logit_draws: bool = False
    over_s: bool = False
    plain_lora: bool = False
    variational: bool = False
    shardable: bool = False
    members: bool = False
    plannable: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Traits] = {
    "scalabl": Traits("ScalaBL", "scalabl:ScalaBL", sampled=True, over_s=True, variational=True, shardable=True),
    "mle": Traits("plain LoRA", "plain:PlainLoRA", plain_lora=True, shardable=True),
    "map": Traits("MAP", "plain:MAP", plain_lora=True, shardable=True, settings={"weight_decay": 0.01}),
    "mc_dropout": Traits(
        "MC dropout", "plain:MCDropout", sampled=True, plain_lora=True, shardable=True, settings={"lora_dropout": 0.1}
    ),
    "blob": Traits(
        "BLoB", "blob:BLoB", sampled=True, variational=True,
        settings={
            "prior_mean": 0.0, "prior_std": 0.2, "init_sigma": 0.05, "variational_learning_rate": 0.01,
            "schedule": "minibatch",
        },
    ),
    # PEFT's sampler computes with the numbers that it draws
    "monteclora": Traits("MonteCLoRA (mean)", "plain:MonteCLoRA", plannable=False),
    "ivon": Traits(
        "IVON", "ivon:IVONLoRA", sampled=True, plain_lora=True, variational=True,
        settings={"warmup": 0.0, "beta": 0.002, "prior_mean": 0.0, "prior_std": 1.0, "init_sigma": 0.03},
    ),
    "temperature": Traits("Temperature", "temperature:Temperature", post_hoc=True),
    "ensemble": Traits("Deep ensemble", "ensemble:Ensemble", post_hoc=True, members=True),
    "laplace": Traits("Laplace-LoRA", "laplace:LaplaceLoRA", post_hoc=True, logit_draws=True),
    "tfb": Traits("TFB", "tfb:TFB", post_hoc=True, sampled=True),
    "last_layer_laplace": Traits(
        "Last-layer Laplace", "last_layer_laplace:LastLayerLaplace", post_hoc=True, logit_draws=True
    ),
    "subspace_laplace": Traits("ScalaBL, post-hoc", "subspace_laplace:SubspaceLaplace", post_hoc=True),
}  # fmt: skip
BASELINE = "mle"  # what every method is compared with, and post-hoc methods are fitted on in a study

TRAINED = tuple(name for name, traits in METHODS.items() if not traits.post_hoc)
POST_HOC = tuple(name for name, traits in METHODS.items() if traits.post_hoc)
SAMPLED = tuple(name for name, traits in METHODS.items() if traits.sampled)
PLAIN_LORA = tuple(name for name, traits in METHODS.items() if traits.plain_lora)
OVER_S = tuple(name for name, traits in METHODS.items() if traits.over_s)
SETTINGS = {name: dict(traits.settings) for name, traits in METHODS.items()}
