"""Whatever judges a completion. A new reward is a file here with TRL's signature.

`load` turns what a user names into a reward function; `function` says how one is called;
`reward_model` is the trained one, and `score_position` says which token its score is read at.
"""
