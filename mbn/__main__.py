"""The command ``python -m mbn``, the same as ``mbn``."""

import sys

from mbn.commands.cli import main

sys.exit(main())
