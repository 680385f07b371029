"""All workloads, one file a subject, in the order of the layer's stages."""

from benches.workload import Workload
from benches.workloads import curves, gemm, hugging_face, layer, moving, route, shapes

ALL: list[Workload] = [
    *route.WORKLOADS,
    *moving.WORKLOADS,
    *gemm.WORKLOADS,
    *layer.WORKLOADS,
    *hugging_face.WORKLOADS,
    *shapes.WORKLOADS,
    *curves.WORKLOADS,
]
#: Peers that are not installed, and why.
MISSING: dict[str, str] = {}
if not hugging_face.WORKLOADS:
    MISSING["transformers"] = "not installed (pip install --group bench)"
