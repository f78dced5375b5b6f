"""How much the KL weighs at an optimiser step: pure functions of the step's number.

The objective of one epoch, divided by the number N of training examples, is

    mean_i E_q[-log p(y_i | x_i, s)] + KL(q || p) / N                                       [ScalaBL, the ELBO]

A trainer minimises the first term, a mean over a batch; the KL's weight at a step is `share / N`, with a share that
depends on the schedule and is 1 on average for `elbo` and `minibatch`.
"""

import math
from typing import Literal, get_args

Schedule = Literal["elbo", "warmup", "minibatch"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def warmup_share(step: int, total_steps: int, fraction: float) -> float:
    """Share of the KL under linear warm-up: 0 at step 0, 1 from step `fraction * total_steps` on.

    Args:
        step: optimiser steps done so far, from 0.
        total_steps: optimiser steps of the whole run.
        fraction: length of the warm-up as a fraction of the run, in [0, 1]; 0 is no warm-up.
    """
    length = fraction * total_steps
    return 1.0 if step >= length else step / length


def minibatch_share(step: int, cycle: int) -> float:
    """Share of the KL under the minibatch weights, pi_i times the cycle's length: 1 on average over a cycle.

    pi_i = 2^i / (2^(M+1) - 1), i = 0 .. M, with M + 1 = cycle: the pi_i of a cycle sum to 1, so that a cycle (an epoch)
    counts the KL once, nearly all of it in its last steps [ScalaBL, section on the experiments; the weights of
    Blundell et al. 2015, "Weight uncertainty in neural networks", eq. 9, in the reverse order].

    Args:
        step: optimiser steps done so far, from 0.
        cycle: M + 1, the steps of a cycle, at least 1.
    """
    i, last = step % cycle, cycle - 1
    # both numerator and denominator divided by 2^M: 2^M itself overflows from M = 1024 on
    return cycle * math.ldexp(1.0, i - last) / (2.0 - math.ldexp(1.0, -last))


def kl_weight(
    schedule: Schedule,
    step: int,
    *,
    num_examples: int,
    total_steps: int,
    cycle: int,
    warmup_fraction: float = 0.1,
    beta: float = 1.0,
) -> float:
    """The factor of KL(q || p) in the loss of one optimiser step: beta * share(step) / num_examples.

    Args:
        schedule: "elbo" (the exact ELBO, share 1 at every step), "warmup" or "minibatch".
        step: optimiser steps done so far, from 0.
        num_examples: N, the number of terms that the loss is a mean of over one epoch.
        total_steps: optimiser steps of the whole run; read by "warmup".
        cycle: steps of one cycle, usually of an epoch; read by "minibatch".
        warmup_fraction: fraction of the run in which the share rises from 0 to 1; read by "warmup".
        beta: multiplier; 1 is the ELBO, smaller values are a tempered posterior.
    """
    share = 1.0
    if schedule == "warmup":
        share = warmup_share(step, total_steps, warmup_fraction)
    elif schedule == "minibatch":
        share = minibatch_share(step, cycle)
    return beta * share / num_examples
