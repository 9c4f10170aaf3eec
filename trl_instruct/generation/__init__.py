"""Prompts -> completions, and the logits that their tokens were drawn from.

`sampling` is the entry point; `token_sampling` runs a batch; `logits` recomputes log-probabilities.
"""
