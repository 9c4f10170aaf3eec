"""After the stages: checkpoints side by side on held-out prompts.

    python recipes/evaluate.py --config recipes/configs/tiny/evaluate.yaml
    python recipes/evaluate.py --models base=gpt2 runs/mine/sft runs/mine/ppo --baseline sft \\
        --judges runs/mine/rm other=runs/other/rm --dataset_name prompts.jsonl \\
        --output_dir runs/mine/evaluation

It prints the tables and saves evaluation.json and evaluation.png.

Options: `--help`, or trl_instruct/configs.yaml. Code: trl_instruct/evaluation/evaluate.py.
From Python: `from trl_instruct import evaluate`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
