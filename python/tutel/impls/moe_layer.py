"""The layer under its historic import path."""

from tutel.layer import MOELayer

moe_layer = MOELayer

__all__ = ["MOELayer", "moe_layer"]
