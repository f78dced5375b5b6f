from .base import Batch as Batch
from .base import Encoded as Encoded
from .base import Scoring as Scoring
from .continuation import Continuation as Continuation
from .letters import Letters as Letters
from .scorer import Scorer as Scorer
from .scorer import make_scoring as make_scoring
from .text import Text as Text
