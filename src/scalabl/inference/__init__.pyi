from .answer import Answer as Answer
from .classifier import Classifier as Classifier
from .predictor import Predictor as Predictor
from .promise import Promise as Promise
from .settings import PredictionSettings as PredictionSettings
