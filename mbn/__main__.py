"""``python -m mbn`` is ``mbn``."""

import sys

from mbn.commands.cli import main

sys.exit(main())
