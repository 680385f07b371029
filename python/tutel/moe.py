"""The historic surface of the package: the names that existing programs use."""

from tutel.layer import MOELayer

moe_layer = MOELayer

__all__ = ["MOELayer", "moe_layer"]
