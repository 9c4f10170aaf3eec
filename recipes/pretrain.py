"""Stage 0: train a small base model from scratch, where no pretrained one is to be had.

    python recipes/pretrain.py --config trl_instruct/tiny/pretrain.yaml

Options: `--help`; trl_instruct/configs.py explains them. What happens: `pretrain` in
trl_instruct/recipes/pretrain.py. From Python: `from trl_instruct import pretrain`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
