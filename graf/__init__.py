"""Label-conditional generative radiance fields; train.py and eval.py are the ways in."""

__version__ = "0.1.0"
