"""The parts of train.py and eval.py: where configuration and rooms meet. No other room imports this one."""
