"""Stage 2: shuffled rows of a store in, nested SAE checkpoints out. No language model is loaded."""
