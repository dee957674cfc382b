"""A Hugging Face causal language model cut at a layer."""
