"""Look at and score a trained generator: `python eval.py` is `graf eval`. See README.md."""

import sys

from graf.app.eval_command import main

if __name__ == "__main__":
    sys.exit(main())
