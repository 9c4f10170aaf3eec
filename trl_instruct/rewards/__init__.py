"""Rewards, which score completions. A new reward is a file here with TRL's signature.

`load` turns what a user names into a reward function; `function` defines how one is called;
`reward_model` wraps a trained model, `score_position` finds the token its score is read at.
"""
