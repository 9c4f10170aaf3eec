"""Models and their tokenizers: load, adapt (LoRA), quantise, share one base, shard, merge.

`load` loads policies and reward models; `adapters` is LoRA; `shared_base` gives roles one base.
"""
