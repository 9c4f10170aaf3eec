"""What went wrong, and in which stage: `report` writes it on one page.

`stages` and `ppo` check, findings.yaml has thresholds and words, `figures` plots, `page` HTML.
"""
