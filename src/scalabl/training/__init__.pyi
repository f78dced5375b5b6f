from .callback import ELBOCallback as ELBOCallback
from .monitors import NonFiniteError as NonFiniteError
from .monitors import NonFiniteGuard as NonFiniteGuard
from .run import Interrupted as Interrupted
from .run import train as train
