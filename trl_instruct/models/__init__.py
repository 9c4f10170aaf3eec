"""Models and their tokenizers: load, adapt (LoRA), quantise, share one base, shard, merge.

`load` gives policies and reward models; `adapters` has LoRA; `shared_base` puts one base into
several roles.
"""
