"""The historic surface of the package: the names that existing programs use."""

from tutel.impls.fast_dispatch import (
    extract_critical,
    fast_cumsum_sub_one,
    fast_decode,
    fast_dispatcher,
    fast_encode,
    get_dispatch_count,
    get_reversed_sample_ids,
    get_topk_selection,
)
from tutel.impls.moe_layer import MOELayer, moe_layer

top_k_routing = extract_critical

__all__ = [
    "MOELayer",
    "extract_critical",
    "fast_cumsum_sub_one",
    "fast_decode",
    "fast_dispatcher",
    "fast_encode",
    "get_dispatch_count",
    "get_reversed_sample_ids",
    "get_topk_selection",
    "moe_layer",
    "top_k_routing",
]
