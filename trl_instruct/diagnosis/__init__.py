"""What went wrong: which stage is at fault, on one page.

`page` is the door, `report`; `stages` and `ppo` hold the thresholds, `figures` the plots.
"""
