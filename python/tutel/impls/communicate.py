"""The historic import path of :mod:`tutel.net`."""

from tutel.net import *  # noqa: F403
from tutel.net import __all__ as __all__
