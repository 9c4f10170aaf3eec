"""RankingRewardTrainer: K completions for C(K,2) comparisons, and how accurate the result is.

`trainer` is the door, `losses` the formula; `evaluation` measures a reward model on held-out
rankings.
"""
