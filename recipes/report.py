"""One page on a finished stage and those it came from: what is at fault, figures, completions.

    python recipes/report.py runs/tiny/ppo

Options: `--help`. The diagnosis' rules: trl_instruct/diagnosis/findings.yaml. From Python:
`from trl_instruct import report`.
"""

import sys

from trl_instruct.__main__ import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
