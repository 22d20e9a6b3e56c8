"""`python -m gatera_lightning`."""

import sys

from gatera_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
