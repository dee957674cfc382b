"""SAEs made elsewhere, read as checkpoints. What decides what they compute is read exactly or refused by name.

    SAELens               cfg.json, sae_weights.safetensors
    dictionary_learning   config.json with a trainer, ae.pt
    matryoshka_sae        config.json, sae.pt (bartbussmann's; BatchTopK's too)
    sparsify              cfg.json, sae.safetensors
    Gemma Scope           params.npz
    Gemma Scope 2         params.safetensors, with or without config.json
    OpenAI                autoencoder.pt

A .pt is a pickle: it is read with weights_only, which runs nothing.

All become a NestedSAE that computes the same latents up to float32 rounding. Rows are raw: center 0, scale 1. Rows that
OpenAI's TopK, SAELens (layer_norm) and matryoshka_sae (input_unit_norm) normalise each by itself are `row_norm`. Transcoders of
SAELens (its four), sparsify and Gemma Scope 1 and 2 likewise: what they make is the `target` beside what they read.
`load_sae` and `read_sae` take these folders and our own checkpoints alike.
"""
