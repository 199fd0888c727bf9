"""Look into models: their feature maps and attention on an image, and the course of training runs.

Nothing here changes how a model computes. Letters: B images, C channels, (h, w) the grid of a layer, N tokens, P prefix
tokens (the class token) before those of the grid, n heads, M queries, d width of a head.

Computation, tensors in and out:

    trace.trace(model, images)           -> Trace: one forward pass with the map of every stage and every attention
    trace.stage_names(model)             -> the layers that a trace keeps by default
    attention.Attention                  queries and keys of one layer; .weights(queries) computes exact rows, and N×N
                                         only if asked to; for softmax and the Performer's kernel
    attention.query_maps(attention, t)   -> (B, n, h, w): attention of token t
    attention.class_maps(attention)      -> (B, n, h, w): attention of the class token, or the mean over all tokens
    attention.rollout(attentions)        -> (B, N, N): attention through all layers
    attention.rollout_map(attentions)    -> (B, h, w): the row of the class token in it
    attention.mean_distance(attention)   -> (B, n): mean attention distance of each head, in tokens
    features.dead_channels(maps)         -> (C,): channels that are zero or constant
    features.edge_agreement(maps, images), features.high_frequency(maps)  -> (B, C): two measures of local structure
    features.measure(trace, images)      -> the three measures for each stage
    features.principal_colours(maps)     -> (B, h, w, 3): the three principal components of the tokens as colours
    features.windows(splits, size)       -> the pixels of the image that each token of a soft split is made from
    features.splits_of(model)            -> the soft splits of a model, or its patch embedding
    features.token_grids(trace)          -> the maps after which the grid changes, and the last
    gradients.grad_cam(model, images)    -> CamMaps: (B, h, w), the regions that raise the score of a class

    opened.open_model(text), opened.open_images(inputs), opened.prepare(photos, preprocessing)
                                         -> models, photos and tensors from what a user types

Drawing, `draw`: results in, a matplotlib Figure out, which `draw.save` writes: feature_maps, structure_curves,
dead_counts, split_windows, token_colours, heat_maps, attention_heads, attention_distance, runs. `report.write_report`
joins PNG files in one HTML file. The command is `visualize.visualize`.
"""
