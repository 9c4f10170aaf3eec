"""PPOTrainer: the loop reads as the paper.

`trainer` is the door; `rollouts`, `advantages` and `losses` are its steps in order; `upstream` is
TRL's own PPOTrainer behind the same constructor.
"""
