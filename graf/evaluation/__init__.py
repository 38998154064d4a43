"""Judging a generator by its images: FID/KID, the held-out measurement, grids and video; no training, no Config."""
