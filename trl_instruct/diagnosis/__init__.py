"""What went wrong, and in which stage: `report` writes it on one page.

`stages` and `ppo` hold the checks and thresholds, findings.yaml their words, `figures` the plots,
`page` the HTML.
"""
