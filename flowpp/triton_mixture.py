"""The mixture coupling as three Triton kernels, which `flowpp.triton_kernels` launches. Only that imports it.

Axes: B images, C channels, P positions of an image (H W), K components, R rows. A row is one position of one
image; a program takes R rows of one channel and all K components (padded to COLUMNS, a power of two) as a tile
[R, COLUMNS], and all sums over K stay in its registers.

Why that tile: h is C (2 + 3K) channels. In channels_last memory, which convolutions leave, the 2 + 3K numbers of
one position and channel lie side by side, so that a row of the tile is one stretch of memory; in contiguous memory
the rows are, being positions that follow one another. Which of the strides is 1 is known when a kernel is compiled
(Triton makes a variant for it), so that one source reads both coalesced. Channels run fastest over the programs: in
channels_last memory neighbours start where the one before ends, and share what lies between out of the cache.

The formulas are those of `flowpp.logistic`, which says why each is written as it is. Clamps are comparisons, since
Triton's minimum and maximum drop a NaN and a NaN must come through.
"""

import triton
import triton.language as tl

from flowpp.logistic import _FREE_EVALUATIONS, LOG_SCALE_FLOOR

FLOOR = tl.constexpr(LOG_SCALE_FLOOR)
FREE_EVALUATIONS = tl.constexpr(_FREE_EVALUATIONS)


@triton.jit(do_not_specialize=["B"])
def couple(
    x, x_strides, h, h_strides, y, y_strides, terms, terms_strides,
    B, C, P, K: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    channel, image, position, real = _rows(B, C, P, R)
    x += _place(x_strides, image, channel, position)
    h += _place(h_strides, image, channel * (2 + 3 * K), position)
    y += _place(y_strides, image, channel, position)
    terms += _place(terms_strides, image, channel, position)
    log_scale, shift = _tanh(tl.load(h, real, 0)), tl.load(h + h_strides[1], real, 0)
    log_weights, means, log_scales = _mixture(h, h_strides[1], real, K, COLUMNS)
    log_scales = _floored(log_scales)

    inverse_scales = tl.exp(-log_scales)
    u, log_derivative = _evaluate(tl.load(x, real, 0), log_weights, means, log_scales, inverse_scales)
    tl.store(y, u * tl.exp(log_scale) + shift, real)
    tl.store(terms, log_derivative + log_scale, real)


@triton.jit(do_not_specialize=["B"])
def couple_backward(
    grad_y, grad_y_strides, grad_terms, grad_terms_strides, x, x_strides, h, h_strides,
    grad_x, grad_x_strides, grad_h, grad_h_strides,
    B, C, P, K: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    channel, image, position, real = _rows(B, C, P, R)
    grad_y += _place(grad_y_strides, image, channel, position)
    grad_terms += _place(grad_terms_strides, image, channel, position)
    x += _place(x_strides, image, channel, position)
    h += _place(h_strides, image, channel * (2 + 3 * K), position)
    grad_x += _place(grad_x_strides, image, channel, position)
    grad_h += _place(grad_h_strides, image, channel * (2 + 3 * K), position)
    a = tl.load(h, real, 0)
    log_scale = _tanh(a)
    log_weights, means, log_scales = _mixture(h, h_strides[1], real, K, COLUMNS)

    inverse_scales = tl.exp(-_floored(log_scales))
    z = (tl.load(x, real, 0)[:, None] - means) * inverse_scales
    log_sigmoid = _log_sigmoid(z)
    log_sigmoid_negative = log_sigmoid - z
    log_above = log_weights + log_sigmoid_negative
    below, log_cdf = _posterior(log_weights + log_sigmoid)
    above, log_survival = _posterior(log_above)
    density, _ = _posterior(log_above + log_sigmoid - _floored(log_scales))
    sigmoid, sigmoid_negative = tl.exp(log_sigmoid), tl.exp(log_sigmoid_negative)

    # y = u exp(tanh a) + b, terms = log_derivative + tanh a
    grad_y, grad_log_derivative = tl.load(grad_y, real, 0), tl.load(grad_terms, real, 0)
    grad_u = grad_y * tl.exp(log_scale)
    grad_log_scale = grad_u * (log_cdf - log_survival) + grad_log_derivative
    # the derivative of tanh; 1 - tanh^2 would lose what is left of it far out
    tl.store(grad_h, grad_log_scale * 4 * tl.sigmoid(2 * a) * tl.sigmoid(-2 * a), real)
    tl.store(grad_h + grad_h_strides[1], grad_y, real)

    grad_below = (grad_u - grad_log_derivative)[:, None] * below
    grad_above = (grad_u + grad_log_derivative)[:, None] * above
    grad_density = grad_log_derivative[:, None] * density
    grad_logits = grad_below - grad_above + grad_density + grad_log_derivative[:, None] * tl.exp(log_weights)
    grad_z = (grad_below + grad_density) * sigmoid_negative + (grad_above - grad_density) * sigmoid
    grad_log_scales = tl.where(log_scales < FLOOR, 0, -z * grad_z - grad_density)
    grad_means = -inverse_scales * grad_z

    k = tl.arange(0, COLUMNS)[None, :]
    stored = real[:, None] & (k < K)
    grad_h = grad_h[:, None]
    tl.store(grad_h + (2 + k) * grad_h_strides[1], grad_logits, stored)
    tl.store(grad_h + (2 + K + k) * grad_h_strides[1], grad_means, stored)
    tl.store(grad_h + (2 + 2 * K + k) * grad_h_strides[1], grad_log_scales, stored)
    tl.store(grad_x, -tl.sum(tl.where(k < K, grad_means, 0), 1), real)


@triton.jit(do_not_specialize=["B"])
def uncouple(
    y, y_strides, h, h_strides, x, x_strides, terms, terms_strides,
    B, C, P, EPSILON: tl.constexpr, MOST_EVALUATIONS: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The iteration of `flowpp.logistic.solve`; a program ends when all its rows rest."""
    channel, image, position, real = _rows(B, C, P, R)
    y += _place(y_strides, image, channel, position)
    h += _place(h_strides, image, channel * (2 + 3 * K), position)
    x_place = x + _place(x_strides, image, channel, position)
    terms += _place(terms_strides, image, channel, position)
    log_scale, shift = _tanh(tl.load(h, real, 0)), tl.load(h + h_strides[1], real, 0)
    log_weights, means, log_scales = _mixture(h, h_strides[1], real, K, COLUMNS)
    log_scales = _floored(log_scales)
    inverse_scales = tl.exp(-log_scales)

    u = (tl.load(y, real, 0) - shift) * tl.exp(-log_scale)
    roots = means + tl.exp(log_scales) * u[:, None]
    present = tl.arange(0, COLUMNS)[None, :] < K
    low = tl.min(tl.where(present, roots, float("inf")), 1)
    high = tl.max(tl.where(present, roots, float("-inf")), 1)
    x = tl.sum(tl.where(present, tl.exp(log_weights) * roots, 0), 1)
    x = tl.where(x < low, low, tl.where(x > high, high, x))
    tolerance = 4 * EPSILON * (1 + tl.abs(u))
    step = high - low
    before = step
    slope = tl.zeros_like(u)  # the logarithm of it
    moving = real
    n = 0
    any_moving = 1
    while any_moving > 0:
        n += 1
        reached, slope = _evaluate(x, log_weights, means, log_scales, inverse_scales)
        error = reached - u
        low = tl.where(error <= 0, x, low)
        high = tl.where(error >= 0, x, high)
        newton = error * tl.exp(-slope)
        settles = (x - newton >= low) & (x - newton <= high) & (2 * tl.abs(newton) <= tl.abs(before))
        settles = settles & ((n <= FREE_EVALUATIONS) | (n % 2 == 0))
        before = step
        step = tl.where(settles, newton, x - (low + high) / 2)
        # false for NaN
        moving = moving & (tl.abs(error) > tolerance) & (2 * tl.abs(step) > EPSILON * tl.abs(x))
        x = tl.where(moving, x - step, x)
        any_moving = tl.max((moving & (n < MOST_EVALUATIONS)).to(tl.int32), 0)
    tl.store(x_place, x, real)
    tl.store(terms, -slope - log_scale, real)


@triton.jit
def _rows(B, C, P, R: tl.constexpr):
    """(channel, image [R], position [R], whether there is such a row [R]) of this program, for 64-bit offsets."""
    program = tl.program_id(0)
    row = (program // C) * R + tl.arange(0, R)
    return (program % C).to(tl.int64), (row // P).to(tl.int64), (row % P).to(tl.int64), row < B * P


@triton.jit
def _place(strides, image, channel, position):
    return image * strides[0] + channel * strides[1] + position * strides[2]


@triton.jit
def _tanh(a):
    return 2 * tl.sigmoid(2 * a) - 1


@triton.jit
def _mixture(h, stride, real, K: tl.constexpr, COLUMNS: tl.constexpr):
    """(log-weights, means, log-scales), [R, COLUMNS] each; what is padded has no weight."""
    k = tl.arange(0, COLUMNS)[None, :]
    present = real[:, None] & (k < K)
    h = h[:, None]
    logits = tl.load(h + (2 + k) * stride, present, 0)
    means = tl.load(h + (2 + K + k) * stride, present, 0)
    log_scales = tl.load(h + (2 + 2 * K + k) * stride, present, 0)
    logits, _, log_sum = _shifted(tl.where(k < K, logits, float("-inf")))
    return logits - log_sum[:, None], means, log_scales


@triton.jit
def _floored(log_scales):
    return tl.where(log_scales < FLOOR, FLOOR, log_scales)


@triton.jit
def _evaluate(x, log_weights, means, log_scales, inverse_scales):
    """`flowpp.logistic._logit_and_log_derivative`, [R] each."""
    z = (x[:, None] - means) * inverse_scales
    log_sigmoid = _log_sigmoid(z)
    log_sigmoid_negative = log_sigmoid - z
    below, log_cdf_shift, log_cdf_rest = _shifted(log_weights + log_sigmoid)
    above, log_survival_shift, log_survival_rest = _shifted(log_weights + log_sigmoid_negative)
    log_cdf, log_survival = log_cdf_shift + log_cdf_rest, log_survival_shift + log_survival_rest
    upper = log_cdf > log_survival
    terms = tl.where(upper[:, None], above + log_sigmoid, below + log_sigmoid_negative) - log_scales
    _, shift, rest = _shifted(terms)
    log_mean = shift + rest - tl.where(upper, log_survival_rest, log_cdf_rest)
    return log_cdf - log_survival, log_mean - tl.where(upper, log_cdf, log_survival)


@triton.jit
def _shifted(terms):
    """(terms - shift, shift, log sum exp(terms - shift)), shift being the greatest term of a row."""
    shift = tl.max(terms, 1)
    terms = terms - shift[:, None]
    return terms, shift, tl.log(tl.sum(tl.exp(terms), 1))


@triton.jit
def _posterior(terms):
    """(softmax, logsumexp) of a row."""
    shift = tl.max(terms, 1)
    terms = tl.exp(terms - shift[:, None])
    total = tl.sum(terms, 1)
    return terms / total[:, None], shift + tl.log(total)


@triton.jit
def _log_sigmoid(z):
    e = tl.exp(-tl.abs(z))
    # log(1 + e): Triton has no log1p that its interpreter knows. The sum's own rounding is known exactly, and what
    # it costs the logarithm is e - (sum - 1) over sum, to first order.
    total = 1 + e
    return tl.where(z < 0, z, 0) - (tl.log(total) + (e - (total - 1)) / total)
