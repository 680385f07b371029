"""Dispatchers bring tokens to the experts' rows and back; each is a way of doing so."""

from tutel.dispatcher.local import LocalDispatcher

__all__ = ["LocalDispatcher"]
