"""Stage 0: train a small base model from scratch, if no pretrained one is available.

    python recipes/pretrain.py --config trl_instruct/tiny/pretrain.yaml

Options: `--help`, or trl_instruct/configs.yaml. Code: trl_instruct/recipes/pretrain.py.
From Python: `from trl_instruct import pretrain`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
