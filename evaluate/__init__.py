"""Stage 3: checkpoints in, scores out (JSON, CSV), and the report made of them."""
