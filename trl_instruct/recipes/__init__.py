"""The stages, one a file: pretrain, sft, candidates, rm, ppo.

Around them: `options` (from YAML and flags), `stage` (folder and result), `memory` (an estimate),
`chain` (which stage came from which).
"""
