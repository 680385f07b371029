"""``python3 -m tutel``: the same as the command ``tutel``."""

import sys

from tutel.commands import main

sys.exit(main())
