"""Photographs, labels, the embedded synthetic set and batch order; no camera maths, no models, no augmentation."""
