"""`python -m ophis`, the same as `ophis`."""

import sys

from ophis.cli import main

if __name__ == "__main__":
    sys.exit(main())
