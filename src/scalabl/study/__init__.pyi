from .benchmark import run_benchmark as run_benchmark
from .plan import StudyPlan as StudyPlan
from .plan import make_plan as make_plan
from .study import Study as Study
from .study import read_study as read_study
