"""Train a 3D-aware GAN: `python train.py --config configs/default.yaml --use_amp` is `graf train`. See README.md."""

import sys
from functools import partial

from graf.app.train_command import main as train

main = partial(train, program="python train.py")

if __name__ == "__main__":
    sys.exit(main())
