"""All workloads, one file a subject, in the order of the layer's stages."""

from benches.workload import Workload
from benches.workloads import curves, deepspeed_layer, gemm, hugging_face, layer, moving, route, shapes

ALL: list[Workload] = [
    *route.WORKLOADS,
    *moving.WORKLOADS,
    *gemm.WORKLOADS,
    *layer.WORKLOADS,
    *hugging_face.WORKLOADS,
    *deepspeed_layer.WORKLOADS,
    *shapes.WORKLOADS,
    *curves.WORKLOADS,
]
#: Peers that are not installed, and why.
MISSING: dict[str, str] = {}
for _name, _module in (("transformers", hugging_face), ("deepspeed", deepspeed_layer)):
    if not _module.WORKLOADS:
        MISSING[_name] = "not installed (see benches/README.md)"
