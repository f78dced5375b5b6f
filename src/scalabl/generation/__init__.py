"""Open-ended answers: text from the average over particles, and a confidence that predicts whether it is wrong."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
