"""``python -m mmtard_bench`` is ``mmtard-bench``."""

import sys

from mmtard_bench.cli import main

sys.exit(main())
