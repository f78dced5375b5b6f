"""What a training takes, before its weights are read: memory by part, operations, the largest batch.

    configuration -> the adapted model on the meta device -> a step of it there -> bytes alive and operations

`plan` has the figures, `refusal` those of a run that is about to begin; `memory` says what there is.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
