"""``python -m cram_bench.executors FOLDER`` does the job that was pickled in a folder."""

import sys
from pathlib import Path

from cram_bench.executors.worker import work_in

work_in(Path(sys.argv[-1]))
