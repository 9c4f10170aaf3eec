"""People label: the page (`page/`, `server`), how far they are (`progress`), and the command.

Doors: command.label, data.labels.LabelStore.
"""
