"""RankingRewardTrainer: C(K,2) comparisons from K completions, and the accuracy of the result.

Start with `trainer`; `losses` has the formula, `evaluation` measures on held-out rankings.
"""
