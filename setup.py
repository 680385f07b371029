"""`python3 setup.py install --user` hands over to pip, which builds with maturin (see pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

command, *options = sys.argv[1:] or ["nothing"]
if command != "install":
    sys.exit(
        f"setup.py knows `install [--user]` only, got {command}: "
        "use `make develop` for an editable build, `make wheel` for a wheel, or `pip install .`"
    )
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", *options, str(Path(__file__).resolve().parent)]))
