"""`python -m graf` is the command `graf`."""

import sys

from graf.app.command_line import main

if __name__ == "__main__":
    sys.exit(main())
