"""Stage 1: text and a language model in, a Zarr store of one layer's residual stream out."""
