"""Layers of every kind against their naive twins: output, auxiliary loss and every gradient.

mean |ours - fp64 twin| <= 2 * mean |naive twin in the same dtype - fp64 twin| over a few batches, see matrix.rule.
``TUTEL_TEST_MATRIX=full`` runs every case instead of a sample.
"""

import copy

import torch
from matrix import twin
from matrix.cases import TOKENS, all_cases, clear_tokens, make_layer
from matrix.rule import BATCHES, assert_close
from reference import exact_values

CASES = list(all_cases())
SAMPLED_BEYOND_PAIRS = 20


def step(function, layer, tokens):
    """Output, auxiliary loss and the gradients of a sum of both, by name."""
    layer.zero_grad()
    tokens = tokens.clone().requires_grad_()
    output, l_aux = function(layer, tokens)
    (torch.sum(output * exact_values(output.shape, output.dtype, seed=5)) + l_aux).backward()
    results = {"output": output.detach(), "l_aux": l_aux.detach(), "gradient of the tokens": tokens.grad}
    for name, parameter in layer.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        results[f"gradient of {name}"] = grad
    return results


def ours(layer, tokens):
    output = layer(tokens)
    return output, output.l_aux


def test_parity(case):
    layer = make_layer(*case)
    batches = clear_tokens(layer, BATCHES * TOKENS, case.dtype).split(TOKENS)
    results, naive = ([step(function, layer, tokens) for tokens in batches] for function in (ours, twin.forward))
    exact = [step(twin.forward, copy.deepcopy(layer).double(), tokens.double()) for tokens in batches]
    for name in results[0]:
        assert_close(name, *([batch[name] for batch in found] for found in (results, naive, exact)))
    if case.capacity != "dropless" and layer.num_global_experts > 1:
        layer(batches[-1])
        assert layer.dispatch_count.max() > 4, "this capacity is meant to drop something"
