"""`python3 setup.py install --user` hands over to pip, which builds with maturin (see pyproject.toml)."""

import subprocess
import sys
from pathlib import Path

options = [option for option in sys.argv[1:] if option != "install"]
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", *options, str(Path(__file__).parent.resolve())]))
