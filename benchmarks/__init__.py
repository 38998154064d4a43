"""One runnable module per published number; each writes its section of RESULTS.md. Nothing of the program imports
these.
"""
