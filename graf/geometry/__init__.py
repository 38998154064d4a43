"""Pure mathematics on tensors: cameras, rays and volume rendering. No modules with weights, no files, no configuration
live here.
"""
