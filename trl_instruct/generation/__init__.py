"""Prompts -> completions, and the logits that their tokens were drawn from.

`sampling` is the door; `token_sampling` runs one batch; `logits` reads log-probabilities again.
"""
