"""``python -m benches.outside``."""

import sys

from benches.outside.cli import main

sys.exit(main())
