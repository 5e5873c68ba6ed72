"""``python -m sharpness_plugins``: the same as the console script ``sharpness``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
