"""What predictions cost, in plain forward passes of the whole model: a model of it, nothing is run. A pass over
R rows of t tokens and m read positions, from decoder layer l of L on, takes

    pass(R, l) = (L - l) w (S + R t) + o (S + R m)          w, o: weights of a decoder layer, of the output layer

multiply-adds, where S is how many tokens a device computes in the time in which it reads the weights: one row more is
not free, but costs less than the first. With B rows a batch, N particles that differ from layer l on, and C classes
(two where a head takes one backward pass, 26 of more, of which the rest are one):

    mean         1
    mc           [pass(B, 0) - pass(B, l) + pass(N B, l)] / pass(B, 0)
    linearized   [pass(B, 0) + (C - 1) b pass(B, l)] / pass(B, 0)

b: a backward pass to activations alone, no weight gradients, beside the forward pass of the same layers. Left out are
attention's own products (rows are short beside the width of a layer) and the integral over logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scalabl.predictive.top_classes import TOP_CLASSES
from scalabl.scoring.base import Encoded
from scalabl.scoring.scorer import Scorer
from scalabl.tuner.layers import decoder_layers, sequence_classifier

# S. CPU: from N = 10 at batch 1 and 4 of SmolLM2-135M in one batch, 6.4 and 8.5 forwards. CUDA: an H100's arithmetic
# beside its memory's bandwidth in bfloat16
SATURATION = {"cpu": 64.0, "cuda": 300.0}
# b. From the linearised predictive of every layer at 4 classes: 4.4 forwards
BACKWARD = 1.15


@dataclass(frozen=True)
class Cost:
    """Of predictions of some rows by a model.

    Attributes:
        layers: L, its decoder layers.
        layer, output: weights of one of them and of the output layer, or of a classification head.
        saturation: S, in tokens.
        tokens, positions: of a mean row; positions are those whose logits are read.
        classes: C, of the row with most.
        several: whether a row may have several of the classes, each of which takes a backward pass.
        batch: B, rows at a time.
        shared: tokens of a mean row that are encoded once a particle for all rows (a shared prompt).
        stored: whether what lies below the first difference is run once; else every layer is run for every particle.
    """

    layers: int
    layer: float
    output: float
    saturation: float
    tokens: float
    positions: float
    classes: int
    batch: int
    shared: float = 0.0
    stored: bool = True
    several: bool = False

    def mc(self, samples: int, start: int) -> float:
        """N particles that differ from decoder layer `start` on (L: in the output layer alone)."""
        start = start if self.stored else 0
        tokens = self.tokens - self.shared
        below = self._pass(self.batch, 0, tokens) - self._pass(self.batch, start, tokens)
        return (below + self._pass(samples * self.batch, start, tokens)) / self._plain

    def linearized(self, start: int, top: int | None = None) -> float:
        """One forward pass, and C - 1 backward passes, TOP_CLASSES at most (of several labels C), or one a top class,
        that stop at decoder layer `start`."""
        of_all = self.classes if self.several else min(self.classes - 1, TOP_CLASSES)
        passes = of_all if top is None else top
        backward = passes * BACKWARD * self._pass(self.batch, start, self.tokens)
        return 1 + backward / self._plain

    @property
    def _plain(self) -> float:
        return self._pass(self.batch, 0, self.tokens)

    def _pass(self, rows: int, start: int, tokens: float) -> float:
        layers = (self.layers - start) * self.layer * (self.saturation + rows * tokens)
        return layers + self.output * (self.saturation + rows * self.positions)


def cost_of(scorer: Scorer, rows: Sequence[Encoded], batch_size: int, prefix: int = 0) -> Cost:
    """The cost model of rows.

    Args:
        scorer: the model with its scoring.
        rows: encoded rows.
        batch_size: rows at a time.
        prefix: tokens of a prompt that all rows share.
    """
    layers = decoder_layers(scorer.model)
    config = scorer.model.config.get_text_config()
    outputs = config.vocab_size if sequence_classifier(scorer.model) is None else config.num_labels
    few = scorer.scoring.collate(rows[:64])
    return Cost(
        layers=len(layers),
        layer=sum(p.numel() for p in layers.parameters()) / len(layers),
        output=outputs * config.hidden_size,
        saturation=SATURATION.get(scorer.device.type, SATURATION["cuda"]),
        tokens=sum(len(row.input_ids) for row in rows) / len(rows),
        positions=len(scorer.scoring.positions(few)[0]) / len(few),
        classes=max(row.num_choices for row in rows),
        several=scorer.scoring.per_row > 1,
        batch=min(batch_size, len(rows)),
        shared=prefix * (1 - 1 / len(rows)),
        stored=scorer.trunk is not None,
    )
