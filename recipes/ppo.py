"""Stage 3: optimise the policy against the reward with PPO.

    python recipes/ppo.py --config recipes/configs/tiny/ppo.yaml

Options: `--help`, or trl_instruct/configs.yaml. Code: trl_instruct/recipes/ppo.py.
From Python: `from trl_instruct import ppo`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["ppo", *sys.argv[1:]])
