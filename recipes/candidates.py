"""Between stages 1 and 2: sample K completions per prompt for a labeler to rank.

    python recipes/candidates.py --config recipes/configs/tiny/candidates.yaml

Options: `--help`, or trl_instruct/configs.yaml. Code: trl_instruct/recipes/candidates.py.
From Python: `from trl_instruct import sample_candidates`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["candidates", *sys.argv[1:]])
