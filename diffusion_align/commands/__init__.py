"""The commands of `diffusion-align`, one file per group; importing them imports no torch."""
