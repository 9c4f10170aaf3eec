"""Stage 2: train a reward model from rankings, and measure it on held-out prompts.

    python recipes/rm.py --config recipes/configs/tiny/rm.yaml

It leaves the model, metrics.json and a figure of them, rm.png. With `--demonstrations_name` the
score is shifted so that demonstrations have 0 on average.

Options: `--help`; trl_instruct/configs.py explains them. What happens: `rm` in
trl_instruct/recipes/rm.py. From Python: `from trl_instruct import rm`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["rm", *sys.argv[1:]])
