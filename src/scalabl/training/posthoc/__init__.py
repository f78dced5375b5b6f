"""Any plain LoRA made Bayesian after its training: the same adapter, with a Gaussian over s around it.

    B A = U diag(sv) V^T,   A := V^T,   B := U diag(sv),   s := 1 for every component          (`svd.py`)

then the exact joint Laplace posterior of all s (`laplace.py`), or variational inference on mean and sigma alone
(`run.py`).

Why s is 1 and the singular values stand in B. The prior is one Gaussian for all numbers of all layers, but singular
values differ between layers and within them by orders of magnitude, and a component that the adapter does not use (sv
= 0) has singular vectors that are arbitrary. With s = sv, a prior of one width gives that component as much noise as
the first one, in a direction that means nothing. With s = 1 every component's noise is a share of its own strength: 1 /
precision is a squared relative error, unused components stay unused, and 0 is exactly representable although means are
kept as logarithms. It is the same as a prior std proportional to each singular value.

Why the prior's mean is 0. The evidence needs a prior whose mean is not the adapter itself: around that, log p(D |
precision) = log p(D | s) - 1/2 sum log(1 + h_i / precision) only grows with the precision, and the best posterior would
be a point. Around s = 0, the base model, a component is a deviation that the data had to justify: its own strength is
what such deviations are like. The mean of the posterior stays at the adapter (an adapter trained without a prior on s
is no mode of likelihood times prior, but its predictions are what people trust), as in Laplace-LoRA.
"""
