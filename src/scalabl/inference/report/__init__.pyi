from .render import write as write
from .results import MethodResult as MethodResult
from .results import Report as Report
from .table import print_table as print_table
