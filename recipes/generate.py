"""What checkpoints say, side by side: to given prompts, or in a conversation.

    python recipes/generate.py --models runs/tiny/sft runs/tiny/ppo --prompt_suffix '\\n'
    python recipes/generate.py --models base=gpt2 runs/mine/ppo --prompts "2+2=" "The sky is"
    python recipes/generate.py --models runs/mine/ppo --dataset_name prompts.jsonl

Without prompts it reads them from the keyboard, a line each, until Ctrl-D. A model with a chat
template is given messages and remembers the conversation; any other goes on with the text as it
stands, so that `--prompt_suffix` gives what a prompt of its records ends with.

Options: `--help`. What happens: trl_instruct/evaluation/answers.py.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
