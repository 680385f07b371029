"""List what a checkpoint file contains: layers, their experts, shapes, dtypes and sizes.

python3 -m tutel.checkpoint.inspect all.ckpt
"""

import dataclasses
import json
from collections.abc import Sequence

from tutel.checkpoint import _command
from tutel.checkpoint.inspection import inspect_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _command.parser(__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", help="*.safetensors, or PyTorch's kind")
    add("--namespace", default="", metavar="NAME", help="entry of PyTorch's file that holds the state: model, or a/b")
    add("--default_num_global_experts", type=int, metavar="E", help="experts of layers in files that do not tell")
    add("--check", action="store_true", help="compare the checksums of PyTorch's file")
    add("--json", action="store_true", help="for programs")
    given = parser.parse_args(arguments)

    def act() -> None:
        found = inspect_file(
            given.file,
            namespace=given.namespace,
            default_num_global_experts=given.default_num_global_experts,
            check=given.check,
        )
        print(json.dumps(dataclasses.asdict(found), indent=2) if given.json else found.text())

    _command.run(act)


if __name__ == "__main__":
    main()
