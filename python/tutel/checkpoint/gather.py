"""Put the checkpoint files of all ranks together in one file, which holds all experts.

python3 -m tutel.checkpoint.gather --inputs='states/{rank}-of-{size}.ckpt' --input_size=4 --output=all.ckpt
"""

from collections.abc import Sequence

from tutel.checkpoint import _command
from tutel.checkpoint.convert import gather_files


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _command.parser(__doc__)
    add = parser.add_argument
    add("--inputs", required=True, metavar="PATTERN", help="names of the files; {rank} and {size} are replaced")
    add("--input_size", type=int, required=True, metavar="W", help="ranks that wrote them")
    add("--output", required=True, metavar="FILE", help="the file to write; *.safetensors, or PyTorch's kind")
    _command.add_state_options(parser)
    add(
        "--allow_different",
        choices=("first", "drop"),
        help="take the first rank's, or none, of values that should be the same on all ranks and are not",
    )
    given = parser.parse_args(arguments)

    def act() -> None:
        options = _command.state_options(given)
        gather_files(given.inputs, given.input_size, given.output, allow_different=given.allow_different, **options)
        print(f"{given.output}: the state of {given.input_size} ranks")

    _command.run(act)


if __name__ == "__main__":
    main()
