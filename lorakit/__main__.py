"""`python -m lorakit` is `lorakit`."""

import sys

from lorakit.cli import main

if __name__ == "__main__":
    sys.exit(main())
