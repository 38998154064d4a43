"""A trained generator in the browser: what a client sees and chooses, how it is drawn in time, and the page itself.

`server.py` and its `panel.py` and `scenery.py` are the only files that speak viser; everything else works without it.
"""
