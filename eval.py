"""Look at and score a trained generator: `python eval.py` renders the newest run from all sides. See README.md."""

import sys

from graf.app.eval_command import main

if __name__ == "__main__":
    sys.exit(main())
