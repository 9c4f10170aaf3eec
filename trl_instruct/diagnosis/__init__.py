"""What went wrong, and in which stage: `report` writes it on one page.

`stages` and `ppo` hold the checks, findings.yaml their thresholds and words, `figures` the plots,
`page` the HTML.
"""
