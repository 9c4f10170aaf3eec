"""Let checkpoints answer side by side, to given prompts or in a conversation.

    python recipes/generate.py --models runs/tiny/sft runs/tiny/ppo --prompt_suffix '\\n'
    python recipes/generate.py --models base=gpt2 runs/mine/ppo --prompts "2+2=" "The sky is"
    python recipes/generate.py --models runs/mine/ppo --dataset_name prompts.jsonl

Without prompts it reads them from the keyboard, one per line, until Ctrl-D. A model with a chat
template gets messages and remembers the conversation. Any other continues the text: set
`--prompt_suffix` to the end of the prompts in its records.

Options: `--help`. Code: trl_instruct/evaluation/answers.py.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
