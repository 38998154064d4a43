"""How a program runs on a machine: device, precision, memory, randomness, checkpoints, logs; no images, no cameras."""
