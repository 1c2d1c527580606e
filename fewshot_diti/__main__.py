"""`python -m fewshot_diti` is the command `fewshot-diti`."""

import sys

from fewshot_diti.cli import main

if __name__ == "__main__":
    sys.exit(main())
