"""The Triton kernels of the token layers; `fused` launches them and says what they are for.

Letters: B images, C channels, CP with those that fill them up, K·K a window, N tokens, D token_dim, F = D/2 random
features. A program works on M tokens, rows or pixels at a time, and on BK of a window's K·K·CP values.
"""

import triton
import triton.language as tl


@triton.jit
def pack(x, out, pixels, width, sb, sc, sh, sw, C: tl.constexpr, CP: tl.constexpr, BP: tl.constexpr):
    """Copy (B, C, H, W) to (B, H, W, CP), the channels padded with zeros."""
    image = tl.program_id(1).to(tl.int64)
    pixel = (tl.program_id(0) * BP + tl.arange(0, BP))[:, None]
    c = tl.arange(0, CP)[None, :]
    value = tl.load(
        x + image * sb + c * sc + pixel // width * sh + pixel % width * sw, mask=(pixel < pixels) & (c < C), other=0.0
    )
    tl.store(out + image * pixels * CP + pixel * CP + c, value, mask=pixel < pixels)


@triton.jit
def _corners(token, cols, inverse, STRIDE: tl.constexpr, PADDING: tl.constexpr):
    """Return the top row and left column of windows, (M,); `inverse` is 1 / cols, exact up to 4M tokens."""
    row = ((token.to(tl.float32) + 0.5) * inverse).to(tl.int32)
    return row * STRIDE - PADDING, (token - row * cols) * STRIDE - PADDING


@triton.jit
def _windows(x, top, left, index, valid, height, width, CP: tl.constexpr, K: tl.constexpr):
    """Load values of windows of (H, W, CP), (M, BK); `index` counts in the order rows, columns, channels."""
    tap = index // CP
    y = top[:, None] + (tap // K)[None, :]
    z = left[:, None] + (tap % K)[None, :]
    inside = valid[:, None] & (tap < K * K)[None, :] & (y >= 0) & (y < height) & (z >= 0) & (z < width)
    return tl.load(x + (y * width + z) * CP + (index % CP)[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def split_norm_linear(
    x,
    weight,
    row_sums,
    shift,
    out,
    means,
    scales,
    tokens,
    cols,
    inverse,
    height,
    width,
    eps,
    C: tl.constexpr,
    CP: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """Split, normalise and project: weight (k·k·CP, 3·D), its sums and shift (3·D,) -> out (B, N, 3·D).

    Also writes each window's mean and (var + eps)^-1/2.

    One pass: everything is of differences to the window's middle value, which is at most √n deviations from the
    mean, so that a flat window loses no digits; what is left of the mean goes at the end.
    """
    SIZE: tl.constexpr = K * K * CP
    image = tl.program_id(1).to(tl.int64)
    x += image * height * width * CP
    token = tl.program_id(0) * M + tl.arange(0, M)
    valid = token < tokens
    top, left = _corners(token, cols, inverse, STRIDE, PADDING)
    y, z = top + K // 2, left + K // 2
    there = valid & (y >= 0) & (y < height) & (z >= 0) & (z < width)
    middle = tl.load(x + (y * width + z) * CP, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros((M, BK), tl.float32)
    squares = tl.zeros((M, BK), tl.float32)
    d = tl.arange(0, D)
    first = tl.zeros((M, D), tl.float32)
    second = tl.zeros((M, D), tl.float32)
    third = tl.zeros((M, D), tl.float32)
    for start in range(0, SIZE, BK):
        index = start + tl.arange(0, BK)
        p = _windows(x, top, left, index, valid, height, width, CP, K) - middle[:, None]
        if CP > C or SIZE % BK > 0:
            p = tl.where(((index % CP < C) & (index < SIZE))[None, :], p, 0.0)
        total += p
        squares += p * p
        p = p.to(weight.dtype.element_ty)
        place = weight + index[:, None] * 3 * D + d[None, :]
        inside = (index < SIZE)[:, None]
        first = tl.dot(p, tl.load(place, mask=inside, other=0.0), first)
        second = tl.dot(p, tl.load(place + D, mask=inside, other=0.0), second)
        third = tl.dot(p, tl.load(place + 2 * D, mask=inside, other=0.0), third)
    mean = tl.sum(total, 1) / (K * K * C)
    scale = 1 / tl.sqrt(tl.maximum(tl.sum(squares, 1) / (K * K * C) - mean * mean, 0.0) + eps)
    row = image * tokens + token
    tl.store(means + row, middle + mean, mask=valid)
    tl.store(scales + row, scale, mask=valid)
    place = out + row[:, None] * 3 * D + d[None, :]
    kind = out.dtype.element_ty
    first = (first - mean[:, None] * tl.load(row_sums + d)[None, :]) * scale[:, None]
    second = (second - mean[:, None] * tl.load(row_sums + D + d)[None, :]) * scale[:, None]
    third = (third - mean[:, None] * tl.load(row_sums + 2 * D + d)[None, :]) * scale[:, None]
    tl.store(place, (first + tl.load(shift + d)[None, :]).to(kind), mask=valid[:, None])
    tl.store(place + D, (second + tl.load(shift + D + d)[None, :]).to(kind), mask=valid[:, None])
    tl.store(place + 2 * D, (third + tl.load(shift + 2 * D + d)[None, :]).to(kind), mask=valid[:, None])


@triton.jit
def split_norm_linear_weight(
    x,
    means,
    scales,
    grad,
    weight_sums,
    shift_sums,
    images,
    tokens,
    cols,
    inverse,
    height,
    width,
    per,
    CP: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
):
    """Sum the gradients of weight, (programs, k·k·CP, 3·D), and shift, (programs, 16, 3·D), over `per` tiles each."""
    SIZE: tl.constexpr = K * K * CP
    index = tl.program_id(0) * BK + tl.arange(0, BK)
    program = tl.program_id(1)
    d = tl.arange(0, D)
    tiles = tl.cdiv(tokens, M)
    kind = grad.dtype.element_ty
    ones = tl.full((16, M), 1.0, kind)
    first = tl.zeros((BK, D), tl.float32)
    second = tl.zeros((BK, D), tl.float32)
    third = tl.zeros((BK, D), tl.float32)
    first_sum = tl.zeros((16, D), tl.float32)
    second_sum = tl.zeros((16, D), tl.float32)
    third_sum = tl.zeros((16, D), tl.float32)
    for tile in range(program * per, (program + 1) * per):
        image = tl.cast(tile // tiles, tl.int64)
        token = tile % tiles * M + tl.arange(0, M)
        valid = (token < tokens) & (image < images)
        row = image * tokens + token
        top, left = _corners(token, cols, inverse, STRIDE, PADDING)
        p = _windows(x + image * height * width * CP, top, left, index, valid, height, width, CP, K)
        mean = tl.load(means + row, mask=valid, other=0.0)
        scale = tl.load(scales + row, mask=valid, other=0.0)
        p = tl.trans(((p - mean[:, None]) * scale[:, None]).to(kind))
        place = grad + row[:, None] * 3 * D + d[None, :]
        g = tl.load(place, mask=valid[:, None], other=0.0)
        first = tl.dot(p, g, first)
        first_sum = tl.dot(ones, g, first_sum)
        g = tl.load(place + D, mask=valid[:, None], other=0.0)
        second = tl.dot(p, g, second)
        second_sum = tl.dot(ones, g, second_sum)
        g = tl.load(place + 2 * D, mask=valid[:, None], other=0.0)
        third = tl.dot(p, g, third)
        third_sum = tl.dot(ones, g, third_sum)
    place = weight_sums + (program * SIZE + index[:, None]) * 3 * D + d[None, :]
    inside = (index < SIZE)[:, None]
    tl.store(place, first, mask=inside)
    tl.store(place + D, second, mask=inside)
    tl.store(place + 2 * D, third, mask=inside)
    if tl.program_id(0) == 0:
        sums = shift_sums + (program * 16 + tl.arange(0, 16)[:, None]) * 3 * D + d[None, :]
        tl.store(sums, first_sum)
        tl.store(sums + D, second_sum)
        tl.store(sums + 2 * D, third_sum)


@triton.jit
def scaled_grad(grad, out, shift, means, scales, scaled, slopes, offsets, rows, size, D: tl.constexpr, M: tl.constexpr):
    """Compute grad·scale, and slope and offset of the gradient through each window's variance, slope·x - offset."""
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    valid = row < rows
    scale = tl.load(scales + row, mask=valid, other=0.0)
    mean = tl.load(means + row, mask=valid, other=0.0)
    total = tl.zeros((M,), tl.float32)
    for part in range(3):
        d = part * D + tl.arange(0, D)
        place = row[:, None] * 3 * D + d[None, :]
        g = tl.load(grad + place, mask=valid[:, None], other=0.0).to(tl.float32)
        y = tl.load(out + place, mask=valid[:, None], other=0.0).to(tl.float32) - tl.load(shift + d)[None, :]
        total += tl.sum(g * y, 1)
        tl.store(scaled + place, (g * scale[:, None]).to(scaled.dtype.element_ty), mask=valid[:, None])
    slope = scale * scale * total / size
    tl.store(slopes + row, slope, mask=valid)
    tl.store(offsets + row, slope * mean, mask=valid)


@triton.jit
def window_grad(
    x,
    spread,
    slopes,
    offsets,
    result,
    rows,
    cols,
    height,
    width,
    CP: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    M: tl.constexpr,
):
    """Compute spread - x·(sum of slopes) + (sum of offsets) over the windows of each pixel: (B, H, W, CP)."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * M + tl.arange(0, M)
    valid = pixel < height * width
    y, z = pixel // width, pixel % width
    slope = tl.zeros((M,), tl.float32)
    offset = tl.zeros((M,), tl.float32)
    for i in range(K):
        for j in range(K):
            top, left = y + PADDING - i, z + PADDING - j
            row, col = top // STRIDE, left // STRIDE
            covered = valid & (top >= 0) & (left >= 0) & (row < rows) & (col < cols)
            covered = covered & (top % STRIDE == 0) & (left % STRIDE == 0)
            token = (image * rows + row) * cols + col
            slope += tl.load(slopes + token, mask=covered, other=0.0)
            offset += tl.load(offsets + token, mask=covered, other=0.0)
    place = (image * height * width + pixel)[:, None] * CP + tl.arange(0, CP)[None, :]
    g = tl.load(spread + place, mask=valid[:, None], other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=valid[:, None], other=0.0).to(tl.float32)
    g += offset[:, None] - value * slope[:, None]
    tl.store(result + place, g.to(result.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _halves(high, low, D: tl.constexpr, F: tl.constexpr):
    """Load the two parts of w for `_features`."""
    place = tl.arange(0, D)[:, None] * F + tl.arange(0, F)[None, :]
    return tl.load(high + place), tl.load(low + place)


@triton.jit
def _features(x, high, low, half_log):
    """Return φ of (M, D): exp(w·x - |x|²/2 - log(m)/2), (M, m); w, (D, m), is a half value and a remainder."""
    half_norm = 0.5 * tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    return tl.exp(tl.dot(x, high) + tl.dot(x, low) - (half_norm + half_log)[:, None])


@triton.jit
def key_sums(kqv, high, low, products, sums, tokens, per, half_log, D: tl.constexpr, F: tl.constexpr, M: tl.constexpr):
    """Sum φ(k)ᵀv and φ(k) over `per` tiles of an image: (B, programs, m, D) and (B, programs, m)."""
    image = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    d, f = tl.arange(0, D), tl.arange(0, F)
    high, low = _halves(high, low, D, F)
    product = tl.zeros((F, D), tl.float32)
    total = tl.zeros((F,), tl.float32)
    for tile in range(program * per, (program + 1) * per):
        token = tile * M + tl.arange(0, M)
        valid = (token < tokens)[:, None]
        place = kqv + (image * tokens + token)[:, None] * 3 * D + d[None, :]
        phi = _features(tl.load(place, mask=valid, other=0.0), high, low, half_log)
        phi = tl.where(valid, phi, 0.0)
        v = tl.load(place + 2 * D, mask=valid, other=0.0).to(tl.float32)
        product = tl.dot(tl.trans(phi), v, product, input_precision='tf32')
        total += tl.sum(phi, 0)
    place = image * tl.num_programs(1) + program
    tl.store(products + (place * F + f[:, None]) * D + d[None, :], product)
    tl.store(sums + place * F + f, total)


@triton.jit
def attend(
    kqv, high, low, products, sums, out, tokens, eps, half_log, D: tl.constexpr, F: tl.constexpr, M: tl.constexpr
):
    """Compute φ(q)·products / (φ(q)·sums + eps): (B, N, D)."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * M + tl.arange(0, M)
    valid = (token < tokens)[:, None]
    d, f = tl.arange(0, D), tl.arange(0, F)
    row = (image * tokens + token)[:, None]
    high, low = _halves(high, low, D, F)
    phi = _features(tl.load(kqv + row * 3 * D + D + d[None, :], mask=valid, other=0.0), high, low, half_log)
    product = tl.load(products + (image * F + f[:, None]) * D + d[None, :])
    total = tl.load(sums + image * F + f)
    weight = tl.sum(phi * total[None, :], 1) + eps
    y = tl.dot(phi, product, input_precision='tf32') / weight[:, None]
    tl.store(out + row * D + d[None, :], y.to(out.dtype.element_ty), mask=valid)


@triton.jit
def attend_grad(
    kqv,
    high,
    low,
    w,
    products,
    sums,
    grad,
    grad_kqv,
    grad_products,
    grad_sums,
    tokens,
    per,
    eps,
    half_log,
    D: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
):
    """Write the gradient of q, and each program's partial sums of the gradients of products and sums."""
    image = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    d, f = tl.arange(0, D), tl.arange(0, F)
    high, low = _halves(high, low, D, F)
    w = tl.load(w + f[:, None] * D + d[None, :])
    product = tl.load(products + (image * F + f[:, None]) * D + d[None, :])
    total = tl.load(sums + image * F + f)
    grad_product = tl.zeros((F, D), tl.float32)
    grad_total = tl.zeros((F,), tl.float32)
    for tile in range(program * per, (program + 1) * per):
        token = tile * M + tl.arange(0, M)
        valid = (token < tokens)[:, None]
        row = (image * tokens + token)[:, None]
        q = tl.load(kqv + row * 3 * D + D + d[None, :], mask=valid, other=0.0)
        phi = _features(q, high, low, half_log)
        weight = tl.sum(phi * total[None, :], 1) + eps
        y = tl.dot(phi, product, input_precision='tf32') / weight[:, None]
        g = tl.load(grad + row * D + d[None, :], mask=valid, other=0.0).to(tl.float32) / weight[:, None]
        grad_weight = -tl.sum(g * y, 1)
        h = (tl.dot(g, tl.trans(product), input_precision='tf32') + grad_weight[:, None] * total[None, :]) * phi
        grad_q = tl.dot(h, w, input_precision='tf32') - tl.sum(h, 1)[:, None] * q.to(tl.float32)
        tl.store(grad_kqv + row * 3 * D + D + d[None, :], grad_q.to(grad_kqv.dtype.element_ty), mask=valid)
        grad_product = tl.dot(tl.trans(phi), g, grad_product, input_precision='tf32')  # g is 0 where not valid
        grad_total += tl.sum(phi * grad_weight[:, None], 0)
    place = image * tl.num_programs(1) + program
    tl.store(grad_products + (place * F + f[:, None]) * D + d[None, :], grad_product)
    tl.store(grad_sums + place * F + f, grad_total)


@triton.jit
def key_grad(
    kqv,
    high,
    low,
    w,
    grad_products,
    grad_sums,
    grad_kqv,
    tokens,
    half_log,
    D: tl.constexpr,
    F: tl.constexpr,
    M: tl.constexpr,
):
    """Write the gradient of k, and add to the gradient of v."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * M + tl.arange(0, M)
    valid = (token < tokens)[:, None]
    d, f = tl.arange(0, D), tl.arange(0, F)
    place = (image * tokens + token)[:, None] * 3 * D + d[None, :]
    high, low = _halves(high, low, D, F)
    w = tl.load(w + f[:, None] * D + d[None, :])
    product = tl.load(grad_products + (image * F + f[:, None]) * D + d[None, :])
    total = tl.load(grad_sums + image * F + f)
    k = tl.load(kqv + place, mask=valid, other=0.0)
    v = tl.load(kqv + place + 2 * D, mask=valid, other=0.0).to(tl.float32)
    phi = _features(k, high, low, half_log)
    h = (tl.dot(v, tl.trans(product), input_precision='tf32') + total[None, :]) * phi
    grad_k = tl.dot(h, w, input_precision='tf32') - tl.sum(h, 1)[:, None] * k.to(tl.float32)
    grad_v = tl.dot(phi, product, input_precision='tf32')
    grad_v += tl.load(grad_kqv + place + 2 * D, mask=valid, other=0.0).to(tl.float32)
    tl.store(grad_kqv + place, grad_k.to(grad_kqv.dtype.element_ty), mask=valid)
    tl.store(grad_kqv + place + 2 * D, grad_v.to(grad_kqv.dtype.element_ty), mask=valid)


@triton.jit
def _kept(seeds, row, d, chance, D: tl.constexpr):
    """Return dropout's factors, (M, D): 0 or 1 / (1 - chance), from a hash of the position and two seeds.

    Philox's draws take longer than all the rest of these kernels (results/speed-h200-2026-11-26).
    """
    h = (row[:, None] * D + d[None, :]).to(tl.uint32) + tl.load(seeds).to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x21F0AAAD ^ tl.load(seeds + 1).to(tl.uint32)
    h = (h ^ (h >> 15)) * 0x735A2D97
    drawn = ((h ^ (h >> 15)) >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return tl.where(drawn >= chance, 1 / (1 - chance), 0.0)


@triton.jit
def _matrices(matrices, D: tl.constexpr):
    """Load the three weights after the attention, (out, in) each: projection, the MLP's first and second."""
    place = matrices + tl.arange(0, D)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(place), tl.load(place + D * D), tl.load(place + 2 * D * D)


@triton.jit
def layer_output(
    y, v, matrices, biases, seeds, out, rows, sv, chance, eps, DROP: tl.constexpr, D: tl.constexpr, M: tl.constexpr
):
    """Compute z + MLP(LN(z)) of z = v + proj(y); the norm's weight and bias are folded into the first matrix."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    valid = (row < rows)[:, None]
    d = tl.arange(0, D)
    kind = y.dtype.element_ty
    proj, first, second = _matrices(matrices, D)
    place = row.to(tl.int64)[:, None] * D + d[None, :]
    z = tl.dot(tl.load(y + place, mask=valid, other=0.0), tl.trans(proj)) + tl.load(biases + d)[None, :]
    if DROP:
        z *= _kept(seeds, row, d, chance, D)
    z += tl.load(v + row.to(tl.int64)[:, None] * sv + d[None, :], mask=valid, other=0.0).to(tl.float32)
    u = z - (tl.sum(z, 1) / D)[:, None]
    u *= (1 / tl.sqrt(tl.sum(u * u, 1) / D + eps))[:, None]
    h = tl.dot(u.to(kind), tl.trans(first)) + tl.load(biases + D + d)[None, :]
    h = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    h = tl.dot(h.to(kind), tl.trans(second)) + tl.load(biases + 2 * D + d)[None, :]
    if DROP:
        h *= _kept(seeds + 2, row, d, chance, D)
    tl.store(out + place, (z + h).to(out.dtype.element_ty), mask=valid)


@triton.jit
def mlp_grad(
    y,
    v,
    matrices,
    biases,
    seeds,
    grad,
    grad_v,
    matrix_sums,
    bias_sums,
    rows,
    sv,
    sgv,
    per,
    chance,
    eps,
    DROP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """Write the gradient of z, which is also v's, and each program's partial sums of those of the MLP."""
    program = tl.program_id(0)
    d = tl.arange(0, D)
    kind = y.dtype.element_ty
    proj, first, second = _matrices(matrices, D)
    ones = tl.full((16, M), 1.0, kind)
    grad_first = tl.zeros((D, D), tl.float32)
    grad_second = tl.zeros((D, D), tl.float32)
    sum_first = tl.zeros((16, D), tl.float32)
    sum_second = tl.zeros((16, D), tl.float32)
    for tile in tl.range(program * per, (program + 1) * per, num_stages=1):
        row = tile * M + tl.arange(0, M)
        valid = (row < rows)[:, None]
        place = row.to(tl.int64)[:, None] * D + d[None, :]
        u = tl.dot(tl.load(y + place, mask=valid, other=0.0), tl.trans(proj)) + tl.load(biases + d)[None, :]
        if DROP:
            u *= _kept(seeds, row, d, chance, D)
        u += tl.load(v + row.to(tl.int64)[:, None] * sv + d[None, :], mask=valid, other=0.0).to(tl.float32)
        u -= (tl.sum(u, 1) / D)[:, None]
        scale = 1 / tl.sqrt(tl.sum(u * u, 1) / D + eps)
        u *= scale[:, None]
        h = tl.dot(u.to(kind), tl.trans(first)) + tl.load(biases + D + d)[None, :]
        cdf = 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)
        g = tl.load(grad + place, mask=valid, other=0.0)
        grad_h = g
        if DROP:
            grad_h = (g.to(tl.float32) * _kept(seeds + 2, row, d, chance, D)).to(kind)
        sum_second = tl.dot(ones, grad_h, sum_second)
        grad_second = tl.dot(tl.trans(grad_h), (h * cdf).to(kind), grad_second)
        slope = cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
        grad_h = (tl.dot(grad_h, second) * slope).to(kind)
        sum_first = tl.dot(ones, grad_h, sum_first)
        grad_first = tl.dot(tl.trans(grad_h), u.to(kind), grad_first)
        grad_u = tl.dot(grad_h, first)
        grad_u -= (tl.sum(grad_u, 1) / D)[:, None] + u * (tl.sum(grad_u * u, 1) / D)[:, None]
        grad_u = g.to(tl.float32) + grad_u * scale[:, None]
        place = row.to(tl.int64)[:, None] * sgv + d[None, :]
        tl.store(grad_v + place, grad_u.to(grad_v.dtype.element_ty), mask=valid)
    sums = matrix_sums + program * 2 * D * D + d[:, None] * D + d[None, :]
    tl.store(sums, grad_first)
    tl.store(sums + D * D, grad_second)
    sums = bias_sums + (program * 16 + tl.arange(0, 16)[:, None]) * 2 * D + d[None, :]
    tl.store(sums, sum_first)
    tl.store(sums + D, sum_second)


@triton.jit
def proj_grad(
    y,
    grad,
    matrices,
    seeds,
    grad_y,
    matrix_sums,
    bias_sums,
    rows,
    sg,
    per,
    chance,
    DROP: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """Write the gradient of y from that of z, and each program's partial sums of those of the projection."""
    program = tl.program_id(0)
    d = tl.arange(0, D)
    kind = y.dtype.element_ty
    proj = tl.load(matrices + d[:, None] * D + d[None, :])
    ones = tl.full((16, M), 1.0, kind)
    grad_proj = tl.zeros((D, D), tl.float32)
    sum_proj = tl.zeros((16, D), tl.float32)
    for tile in range(program * per, (program + 1) * per):
        row = tile * M + tl.arange(0, M)
        valid = (row < rows)[:, None]
        place = row.to(tl.int64)[:, None] * D + d[None, :]
        g = tl.load(grad + row.to(tl.int64)[:, None] * sg + d[None, :], mask=valid, other=0.0)
        if DROP:
            g = (g.to(tl.float32) * _kept(seeds, row, d, chance, D)).to(kind)
        sum_proj = tl.dot(ones, g, sum_proj)
        grad_proj = tl.dot(tl.trans(g), tl.load(y + place, mask=valid, other=0.0), grad_proj)
        tl.store(grad_y + place, tl.dot(g, proj).to(grad_y.dtype.element_ty), mask=valid)
    tl.store(matrix_sums + (program * D + d[:, None]) * D + d[None, :], grad_proj)
    tl.store(bias_sums + (program * 16 + tl.arange(0, 16)[:, None]) * D + d[None, :], sum_proj)
