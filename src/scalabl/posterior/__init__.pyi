from .draws import standard_normal as standard_normal
from .gaussian import POSTERIORS as POSTERIORS
from .gaussian import DiagonalGaussian as DiagonalGaussian
from .gaussian import FullGaussian as FullGaussian
from .gaussian import Gaussian as Gaussian
from .gaussian import Prior as Prior
from .gaussian import forward_kl_gradient as forward_kl_gradient
from .joint import JointGaussian as JointGaussian
