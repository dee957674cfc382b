"""A member's step on a CUDA device in fused passes, in Triton: the same numbers as `Member`, within rounding.

Between the large products, which are torch's, everything that touches a large array is one pass over it. A step of batchtopk at
d 2304, width 16384, 2048 rows is 34 launches and 3.6 GB, where the plain one is 161 operations and 9.5 GB. What it depends on
beside the contents of tensors is decided on the device: nothing is fetched, and what is not needed (a second search for a
threshold, the auxiliary loss while no latent is dead) is a launch that returns at once.

    choice     which members step so                     step        the order of a step
    context    what its parts share                      batch       rows normalised
    activation, thresholds, latents                      forward, from products to latents
    dense, sparse                                        the large products: over all latents, over active ones
    residuals, auxiliary                                 the loss and what it sends back
    backward, optimiser, account                         gradients, weights, counters

A module holds kernels and the functions that launch them. What they compute is what `latents`, `objectives`, `optim` and
`member` say. All arithmetic is in float32 in registers, sums over the batch in float64; nothing is added by floating-point
atomics, so a step gives the same bits every time. Arrays of [row, latent] go through in tiles: a program takes ROWS rows of
LATENTS latents, and leaves a partial sum a column, [part, latent], where the batch is summed over. Constants of kernels:

    KIND  0 relu, topk, batchtopk (whose selection is a threshold)    1 jumprelu
    NORM  0 none    1 LayerNorm before the activation    2 after it
"""
