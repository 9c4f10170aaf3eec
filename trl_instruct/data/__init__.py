"""Records: demonstrations, prompts and texts, rankings, pairs.

`sources` says where they come from, `records` what each must be; `rankings` and `pairs` are the two
forms of preferences, and `preferences` picks what the reward model trains on and is measured on.
"""
