"""The stages, one per file: pretrain, sft, candidates, rm, ppo.

Around them: `options` (YAML and flags), `stage` (folder, result), `memory` (estimate), `chain`.
"""
