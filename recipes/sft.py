"""Stage 1: fine-tune a base model on demonstrations.

    python recipes/sft.py --config recipes/configs/tiny/sft.yaml
    accelerate launch recipes/sft.py --config my.yaml --model_name_or_path gpt2 --learning_rate 1e-5

Options: `--help`, or trl_instruct/configs.yaml. Code: trl_instruct/recipes/sft.py.
From Python: `from trl_instruct import sft`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["sft", *sys.argv[1:]])
