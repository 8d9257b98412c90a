"""``python -m mbn`` is ``mbn``."""

import sys

from mbn.cli import main

sys.exit(main())
