from .auto import AutoPredictive as AutoPredictive
from .auto import make_predictive as make_predictive
from .base import MeanPredictive as MeanPredictive
from .base import Predictive as Predictive
from .base import predict as predict
from .linearized import LinearizedPredictive as LinearizedPredictive
from .monte_carlo import MonteCarloPredictive as MonteCarloPredictive
from .sampling import PREDICTIVES as PREDICTIVES
