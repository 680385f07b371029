"""The older name of :mod:`tutel.system`."""

from tutel.system import *  # noqa: F403
from tutel.system import __all__ as __all__
