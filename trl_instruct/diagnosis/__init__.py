"""What went wrong, and in which stage: `report` writes it on one page.

`findings` checks (thresholds and words: findings.yaml), `page` writes HTML and its figures.
"""
