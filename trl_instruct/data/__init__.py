"""Records: demonstrations, prompts and texts, rankings, pairs.

`sources` loads them and `records` checks them. `rankings` and `pairs` are the two forms of
preferences; `preferences` picks those that the reward model trains and is evaluated on.
"""
