"""``python -m cram_bench.cli`` is ``cram-bench``."""

import sys

from cram_bench.cli import main

sys.exit(main())
