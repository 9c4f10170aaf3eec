"""Checkpoints side by side on held-out prompts: `evaluate` and `compare`.

`measurement` samples and scores for both; `tables` shows the result.
"""
