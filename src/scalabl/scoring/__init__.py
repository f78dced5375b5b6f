"""From a row to class log-probabilities: prompt -> tokens -> the model's logits -> one number a choice.

A scoring is either `letters` (next-token distribution over label words) or `continuation` (a softmax over the
log-likelihoods of the choice texts, summed or per token). Rows of text have no choices: `text` is the log-likelihood of
what they are trained on.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
