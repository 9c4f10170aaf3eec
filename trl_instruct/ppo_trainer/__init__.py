"""PPOTrainer: the loop reads as the paper.

Start at `trainer`; `rollouts`, `advantages` and `losses` are its steps in order; `upstream` is
TRL's own PPOTrainer with the same constructor.
"""
