"""A run outside of one process: as plain LoRAs on disk, behind an OpenAI-compatible server, and on a Ray cluster.

scalabl export      OUT/particles/0 ... N-1, each a plain LoRA, and manifest.json: what they are and how rows are scored
vllm serve          one adapter a particle (`manifest.py` gives the line)
`vllm.py`           gets every particle's probabilities from the server and averages them
predict --ray       shards of rows answered by a pool of predictors (`batch.py`), by Ray Data
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
