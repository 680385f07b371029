"""torch's own check of gradients, in fp64, for layers of every kind: in the tokens and in every parameter.

``TUTEL_TEST_MATRIX=full`` runs every case instead of a sample.
"""

import torch
from matrix.cases import all_cases, clear_tokens, make_layer
from torch.autograd import gradcheck

# relu has a kink, where differences are no derivatives.
CASES = [case for case in all_cases([torch.float64]) if case.experts != "relu"]
SAMPLED_BEYOND_PAIRS = 0


def test_gradcheck(case):
    layer = make_layer(*case)
    names = [name for name, _ in layer.named_parameters()]

    def function(tokens, *parameters):
        output = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (tokens,))
        return output, output.l_aux

    tokens = clear_tokens(layer, count=7, dtype=torch.float64).clone().requires_grad_()
    assert gradcheck(function, (tokens, *layer.parameters()), fast_mode=True)
