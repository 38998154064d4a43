"""Pure mathematics on tensors: cameras, rays, volume rendering, warping; no weights, no files, no configuration."""
