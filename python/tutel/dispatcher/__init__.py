"""Dispatchers bring tokens to rows, to their experts and back; each is a way of doing so."""

from tutel.dispatcher.choose import Dispatcher, Dispatchers
from tutel.dispatcher.local import LocalDispatcher

__all__ = ["Dispatcher", "Dispatchers", "LocalDispatcher"]
