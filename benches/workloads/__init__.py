"""All workloads, one file a subject, in the order of the layer's stages."""

from benches.workload import Workload
from benches.workloads import gemm, layer, moving, route

ALL: list[Workload] = [*route.WORKLOADS, *moving.WORKLOADS, *gemm.WORKLOADS, *layer.WORKLOADS]
