"""Divide a checkpoint file that holds all experts into files for several ranks.

python3 -m tutel.checkpoint.scatter --input=all.ckpt --output_size=8 --outputs='states/{rank}-of-{size}.ckpt'
"""

from collections.abc import Sequence

from tutel.checkpoint import _command
from tutel.checkpoint.convert import scatter_file


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _command.parser(__doc__)
    add = parser.add_argument
    add("--input", required=True, metavar="FILE", help="the file; *.safetensors, or PyTorch's kind")
    add("--output_size", type=int, required=True, metavar="W", help="ranks, a divisor or a multiple of the experts")
    add(
        "--outputs",
        required=True,
        metavar="PATTERN",
        help="names of the files to write; {rank} and {size} are replaced",
    )
    _command.add_state_options(parser)
    given = parser.parse_args(arguments)

    def act() -> None:
        scatter_file(given.input, given.output_size, given.outputs, **_command.state_options(given))
        print(f"{given.outputs}: the states of {given.output_size} ranks")

    _command.run(act)


if __name__ == "__main__":
    main()
