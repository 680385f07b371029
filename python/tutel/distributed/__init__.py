"""Ranks and what they say to each other: groups, collectives, the optimizer of shared parameters.

The only package that calls ``torch.distributed``. One process needs no process group and none is made for it; what
needs several ranks raises NotImplementedError until it is there.
"""
