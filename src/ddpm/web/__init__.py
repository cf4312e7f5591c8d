"""The page of `make serve`, and the addresses that it and other clients ask. No stage of the pipeline depends on it.

Read app.py first: every address. drawing.py draws step by step, turns.py lets drawings take turns, models.py knows which models
there are, and reality.py compares samples with real images. page.html is the page itself, with its style and its script.
"""
