from .plan import CannotPlanError as CannotPlanError
from .plan import Plan as Plan
from .plan import Planner as Planner
from .plan import make_plan as make_plan
from .refusal import RunPlan as RunPlan
from .refusal import plan_run as plan_run
from .step import PlannedRows as PlannedRows
