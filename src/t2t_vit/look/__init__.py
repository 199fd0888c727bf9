"""Looking into models: what their layers hold of an image, where they look, what a run was like.

Two layers, and nothing here that changes how a model computes. Letters: B images, C channels, (h, w) a layer's grid,
N tokens, P prefix tokens (the class token) in front of the grid's, n heads, M queries, d width of a head.

Compute layer: tensors in, tensors out.

    trace.trace(model, images)           -> Trace: one forward pass, with every stage's map and every attention
    trace.stage_names(model)             -> the layers that a trace keeps by default
    attention.Attention                  what one layer attends to: .weights(queries) are exact rows, never N×N unless
                                         asked for; softmax and the Performer's kernel alike
    attention.query_maps(attention, t)   -> (B, n, h, w): where token t looks
    attention.class_maps(attention)      -> (B, n, h, w): where the class token looks, or all tokens on average
    attention.rollout(attentions)        -> (B, N, N): attention through all layers
    attention.rollout_map(attentions)    -> (B, h, w): its row of the class token
    attention.mean_distance(attention)   -> (B, n): how far a head looks, in tokens
    features.dead_channels(maps)         -> (C,) which channels are zero or constant
    features.edge_agreement(maps, images), features.high_frequency(maps)  -> (B, C): local structure, two measures
    features.measure(trace, images)      -> a LayerMeasure for each stage: the three above
    features.principal_colours(maps)     -> (B, h, w, 3): the three principal components of tokens as colours
    features.windows(splits, size)       -> the image's pixels under each token of every soft split
    features.splits_of(model)            -> a model's soft splits, or its patch embedding
    features.token_grids(trace)          -> the maps behind which the grid is another, and the last
    gradients.grad_cam(model, images)    -> CamMaps: (B, h, w), which regions raise a class's score

    opened.open_model(text), opened.open_images(inputs), opened.prepare(photos, preprocessing)
                                         from what a user types to models, photos, tensors

Drawing layer, `draw`: what the compute layer gives in, a matplotlib Figure out, which `draw.save` writes: feature_maps,
structure_curves, dead_counts, split_windows, token_colours, heat_maps, attention_heads, attention_distance, runs.
`report.write_report` puts PNG files into one HTML file. The command is `visualize.visualize`.
"""
