from .loading import load_adapter as load_adapter
from .loading import load_run as load_run
from .models import load_base as load_base
from .record import RunRecord as RunRecord
from .settings import Settings as Settings
from .settings import make_settings as make_settings
