"""Stage 2: train a reward model from rankings, and measure it on held-out prompts.

    python recipes/rm.py --config recipes/configs/tiny/rm.yaml

It saves the model, metrics.json and their figure, rm.png. `--demonstrations_name` shifts the score
so that demonstrations average 0.

Options: `--help`, or trl_instruct/configs.yaml. Code: trl_instruct/recipes/rm.py.
From Python: `from trl_instruct import rm`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["rm", *sys.argv[1:]])
