"""A dry run of sft, rm or ppo: read all that it would read, list every fault, train nothing.

    python recipes/check.py sft --config recipes/configs/tiny/sft.yaml

It ends with exit 0 or 2. After the stage's name come the stage's own options. `make check-data`
checks the stages of a CONFIG.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["check", *sys.argv[1:]])
