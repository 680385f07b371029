"""Raise errors in every way that operators can, many times: each has to arrive as an exception with its full text.

A program of its own, for clean environments: a process that an error kills cannot report so itself.
"""

import sys

import torch

from tutel import functional, moe

ROUNDS = 200


def cases():
    """Give (what to do, the exception, how its text starts: torch may add where it was thrown)."""
    tokens = torch.ones(3, 4)
    operators = torch.ops.tutel
    layer = moe.moe_layer({"type": "top", "k": 1}, 4, {"type": "ffn", "hidden_size_per_expert": 2})
    ids = torch.tensor([[0], [7]], dtype=torch.int32)
    # Python checks nothing of the first three: their texts come from Rust.
    yield (
        lambda: operators.select_experts(tokens[0], 1, True, True),
        RuntimeError,
        "tutel::select_experts: logits must have 2 dimensions, got shape [4]",
    )
    yield (
        lambda: operators.dispatch(tokens.long(), torch.zeros(3, dtype=torch.int64), None, 1),
        RuntimeError,
        "tutel::dispatch: tokens must be float64, float32, bfloat16 or float16, got int64",
    )
    yield (
        lambda: functional.assign_rows(ids, 4),
        RuntimeError,
        "tutel::assign_rows: topk_ids[1] is 7, allowed are -1 (none) and 0 up to, not including, 4",
    )
    yield (
        lambda: functional.select_experts(tokens, 5),
        ValueError,
        "top_k must be at most the number of experts (4), got 5",
    )
    yield (
        lambda: layer(torch.ones(2, 3)),
        ValueError,
        "input's last dimension must hold model_dim=4 values, got shape [2, 3]",
    )


def main() -> None:
    raised = 0
    for _ in range(ROUNDS):
        for act, exception, text in cases():
            try:
                act()
            except exception as error:
                if not str(error).startswith(text):
                    sys.exit(f"expected an error that starts with {text!r}, got {error!r}")
                raised += 1
            else:
                sys.exit(f"no error where {text!r} was expected")
    print(f"{raised} errors arrived as exceptions with their text (torch {torch.__version__})")


if __name__ == "__main__":
    main()
