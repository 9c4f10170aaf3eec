"""How good: checkpoints side by side on held-out prompts.

`evaluate` and `compare` are the doors; `measurement` is what both measure; `tables` shows it.
"""
