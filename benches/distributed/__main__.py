"""``python -m benches.distributed``."""

import sys

from benches.distributed.cli import main

sys.exit(main())
