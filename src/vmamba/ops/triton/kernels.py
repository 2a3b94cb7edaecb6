"""The Triton kernels of the backend `triton`; imported with the first call that needs them.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.

A program owns tiles of an image, TH × TW positions, and BD channels. It loads x once and walks all routes
over it: within a tile a route is a scan along its rows or its columns, the *segments* of the route, and what
a segment needs from outside is one state. So a first pass over the tiles, `summary_kernel`, stores what each
segment does to a state (a factor and a summand), `chain_kernel` turns these into the state before each
segment, and `output_kernel` forms y. An image within one tile is one segment and needs the last pass alone.

The backward is the same walk with the routes reversed: the adjoint state u_t = a_t (C_t dy_t + u_{t+1}) goes
through `summary_kernel` and `chain_kernel`, and `gradient_kernel` forms every gradient from both states.

No two programs store to the same address, so that no result depends on their order. Offsets within an image
are int32, those of images int64.
"""

import triton
import triton.language as tl

ANY = [
    "height",
    "width",
    "blocks",
    "codes",
    "R",
    "segments",
    "row_segments",
    "column_segments",
    "row_p",
    "row_k",
    "rows_ptr",
    "delta_ptr",
    "parameters_ptr",
    "elapsed_ptr",
    "summand_ptr",
    "initial_ptr",
    "carry_ptr",
    "last_ptr",
    "adjoint_ptr",
    "grad_delta_ptr",
    "grad_rows_ptr",
    "shares_ptr",
    "grad_initial_ptr",
]
"""Arguments that kernels are not specialised on: neither for the value 1 or multiples of 16, nor on AMD for
pointers to less than 2 GiB. The latter would allow buffer instructions, which take four scalar registers a
pointer."""


@triton.jit
def compose(p1, q1, p2, q2):
    """h ↦ p₁h + q₁, then h ↦ p₂h + q₂."""
    return p2 * p1, p2 * q1 + q2


@triton.jit
def compose_before(p1, q1, b1, p2, q2, b2):
    """h ↦ p h + q with b still to be added, twice: a scan of it gives a_t h_{t-1}, from (a_t, 0, b_t)."""
    return p2 * p1, p2 * (q1 + b1) + q2, b2


@triton.jit
def compose_adjoint(p1, q1, a1, p2, q2, a2):
    """u ↦ p u + q with a still to be multiplied, twice: gives c_t + u_{t+1}, from (1, c_t, a_t)."""
    return p2 * (a1 * p1), p2 * (a1 * q1) + q2, a2


@triton.jit
def compose_last(p1, q1, r1, s1, p2, q2, r2, s2):
    """h ↦ p h + q, then h ↦ r h + s still to come, twice: a scan gives the state before each (r, s)."""
    return p2 * (r1 * p1), p2 * (r1 * q1 + s1) + q2, r2, s2


@triton.jit
def softplus(z):
    """log(1 + exp(z)) to the last digits, where exp(z) is small too, and its derivative."""
    e = tl.exp(-tl.abs(z))
    # log(1 + e) = 2 artanh(s), s = e / (2 + e) at most 1/3: as many terms as the type's digits need.
    s = e / (2 + e)
    TERMS: tl.constexpr = 17 if z.dtype == tl.float64 else 8
    series = tl.full(z.shape, 1 / (2 * TERMS - 1), z.dtype)
    for i in tl.static_range(2, TERMS + 1):
        series = series * (s * s) + 1 / (2 * (TERMS - i) + 1)
    return tl.maximum(z, 0) + 2 * s * series, tl.where(z >= 0, 1, e) / (1 + e)


@triton.jit
def states_of(a, b, route):
    """h_t from a_t and b_t, (TH, TW, BD); the state before a segment is in b of its first position."""
    if route == 0:
        _, h = tl.associative_scan((a, b), 1, compose, reverse=False)
    elif route == 1:
        _, h = tl.associative_scan((a, b), 0, compose, reverse=False)
    elif route == 2:
        _, h = tl.associative_scan((a, b), 1, compose, reverse=True)
    else:
        _, h = tl.associative_scan((a, b), 0, compose, reverse=True)
    return h


@triton.jit
def decayed_states_of(a, first, b, route):
    """a_t h_{t-1} from a_t, that of the first position of each segment (else 0), and b_t."""
    if route == 0:
        _, h, _ = tl.associative_scan((a, first, b), 1, compose_before, reverse=False)
    elif route == 1:
        _, h, _ = tl.associative_scan((a, first, b), 0, compose_before, reverse=False)
    elif route == 2:
        _, h, _ = tl.associative_scan((a, first, b), 1, compose_before, reverse=True)
    else:
        _, h, _ = tl.associative_scan((a, first, b), 0, compose_before, reverse=True)
    return h


@triton.jit
def adjoint_states_of(a, c, route):
    """c_t + u_{t+1} from a_t and c_t, to which the adjoint state after each segment is added."""
    one = tl.full(a.shape, 1, a.dtype)
    if route == 0:
        _, u, _ = tl.associative_scan((one, c, a), 1, compose_adjoint, reverse=True)
    elif route == 1:
        _, u, _ = tl.associative_scan((one, c, a), 0, compose_adjoint, reverse=True)
    elif route == 2:
        _, u, _ = tl.associative_scan((one, c, a), 1, compose_adjoint, reverse=False)
    else:
        _, u, _ = tl.associative_scan((one, c, a), 0, compose_adjoint, reverse=False)
    return u


@triton.jit
def within(d, channels, EVEN: tl.constexpr):
    """The mask of the channels d that exist; EVEN: all do."""
    if EVEN:  # noqa: SIM108  (the compiler takes one branch)
        m_d = tl.full(d.shape, 1, tl.int1)
    else:
        m_d = d < channels
    return m_d


@triton.jit
def step_sizes(
    delta,  # (TH, TW, 1) pointers to the rows of delta; LOW_RANK: of its low-rank factor
    parameters,  # (BD,) pointers
    d,  # (BD,)
    m_d,  # (BD,)
    inside,  # (TH, TW, 1)
    channels,
    N: tl.constexpr,
    R,
    LOW_RANK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATE: tl.constexpr,
):
    """softplus(delta + bias) and its derivative, (TH, TW, BD), 0 outside."""
    z = tl.load(parameters + N * channels, mask=m_d, other=0)[None, None, :] + tl.zeros(inside.shape, STATE)
    if LOW_RANK:
        for r in tl.range(R, disable_licm=True, loop_unroll_factor=1):
            weight = tl.load(parameters + (N + 1 + r) * channels, mask=m_d, other=0)[None, None, :]
            z += tl.load(delta + r, mask=inside, other=0).to(STATE) * weight
    else:
        z += tl.load(delta + d[None, None, :], mask=inside & m_d[None, None, :], other=0).to(STATE)
    slope = tl.full(z.shape, 1, STATE)
    if SOFTPLUS:
        z, slope = softplus(z)
    return tl.where(inside, z, 0), tl.where(inside, slope, 0)


@triton.jit
def first_tile(height, width, TILES: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """The program's image, and the first of its tiles there."""
    first, of_image = tl.program_id(0) * TILES, tl.cdiv(width, TW) * tl.cdiv(height, TH)
    return (first // of_image).to(tl.int64), first % of_image


@triton.jit
def positions(tile, width, TH: tl.constexpr, TW: tl.constexpr):
    """A tile's rows (TH, 1, 1) and columns (1, TW, 1)."""
    across = tl.cdiv(width, TW)
    h = tile // across * TH + tl.arange(0, TH)[:, None, None]
    return h, tile % across * TW + tl.arange(0, TW)[None, :, None]


@triton.jit
def row_segments(tile, h, width, TW: tl.constexpr):
    """The places of the tile's rows among the segments of rows, (TH, 1, 1)."""
    across = tl.cdiv(width, TW)
    return h * across + tile % across


@triton.jit
def column_segments(tile, w, height, width, TH: tl.constexpr, TW: tl.constexpr):
    """The places of the tile's columns among the segments of columns, (1, TW, 1)."""
    return w * tl.cdiv(height, TH) + tile // tl.cdiv(width, TW)


@triton.jit
def add_before(s1, d1, s2, d2):
    """Sums with the last summand still to be added, joined: a scan of it sums what comes before."""
    return s1 + d1 + s2, d2


@triton.jit
def summed(delta, AXIS: tl.constexpr, REVERSED: tl.constexpr, ADJOINT: tl.constexpr):
    """The sum of the step sizes that a segment has after each position; ADJOINT: before it and there."""
    if ADJOINT:
        total = tl.cumsum(delta, AXIS, reverse=REVERSED)
    else:
        total, _ = tl.associative_scan((tl.zeros_like(delta), delta), AXIS, add_before, reverse=not REVERSED)
    return total


@triton.jit
def sums_of(delta, route, ADJOINT: tl.constexpr):
    """`summed` for any route."""
    if route == 0:
        sums = summed(delta, 1, False, ADJOINT)
    elif route == 1:
        sums = summed(delta, 0, False, ADJOINT)
    elif route == 2:
        sums = summed(delta, 1, True, ADJOINT)
    else:
        sums = summed(delta, 0, True, ADJOINT)
    return sums


@triton.jit(do_not_specialize=ANY)
def summary_kernel(
    x_ptr,  # (b, h, w, d); ADJOINT: the gradient of y
    delta_ptr,  # (b, h, w, k, d), without LOW_RANK
    rows_ptr,  # (b, h, w, k, r + n + n): with LOW_RANK delta's low-rank factor, then B and C
    parameters_ptr,  # (1 + k·(n + 1 + r), d): D summed over routes; of each route A, bias and delta_weight
    elapsed_ptr,  # (b, k, segments, d)
    summand_ptr,  # (b, k, n, segments, d)
    row_p,
    row_k,
    height,
    width,
    channels,
    blocks,
    segments,
    codes,
    K: tl.constexpr,
    N: tl.constexpr,
    R,
    LOW_RANK: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ADJOINT: tl.constexpr,
    EVEN: tl.constexpr,
    STATE: tl.constexpr,
    TILES: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """What each segment of the tile does to a state; ADJOINT: to an adjoint state, the route reversed.

    h ↦ exp(A s) h + q, s the sum of its step sizes, q = Σ exp(A s_t) δ_t B_t x_t with s_t the sum of those
    after t; for the adjoint q = Σ exp(A s_t) C_t dy_t with s_t the sum of those before t and of t.
    """
    image, first = first_tile(height, width, TILES, TH, TW)
    x_ptr += image * height * width * channels
    rows_ptr += image * height * width * row_p
    delta_ptr += image * height * width * K * channels
    elapsed_ptr += image * K * segments * channels
    summand_ptr += image * K * N * segments * channels
    for block in tl.range(blocks, disable_licm=True, loop_unroll_factor=1):
        d = (tl.program_id(1) * blocks + block) * BD + tl.arange(0, BD)
        channel = within(d, channels, EVEN)
        m_d = channel[None, None, :]
        for i in tl.range(TILES, disable_licm=True, loop_unroll_factor=1):
            tile = first + i
            h, w = positions(tile, width, TH, TW)
            inside = (h < height) & (w < width)
            position = h * width + w
            o_x = position * channels + d[None, None, :]
            x = tl.load(x_ptr + o_x, mask=inside & m_d, other=0).to(STATE)
            for k in tl.range(K, disable_licm=True, loop_unroll_factor=1):
                route = (codes >> (2 * k)) & 3
                rows = rows_ptr + (k * row_k + position * row_p)
                parameters = parameters_ptr + (1 + k * (N + 1 + R)) * channels + d
                delta, _ = step_sizes(
                    rows if LOW_RANK else delta_ptr + (position * K + k) * channels,
                    parameters,
                    d,
                    channel,
                    inside,
                    channels,
                    N,
                    R,
                    LOW_RANK,
                    SOFTPLUS,
                    STATE,
                )
                sums = sums_of(delta, route, ADJOINT)
                row = row_segments(tile, h, width, TW) * channels + d[None, None, :]
                column = column_segments(tile, w, height, width, TH, TW) * channels + d[None, None, :]
                elapsed = elapsed_ptr + k * segments * channels
                if route % 2 == 0:
                    row_elapsed = tl.sum(delta, 1, keep_dims=True)
                    tl.store(elapsed + row, row_elapsed, mask=(h < height) & m_d)
                else:
                    column_elapsed = tl.sum(delta, 0, keep_dims=True)
                    tl.store(elapsed + column, column_elapsed, mask=(w < width) & m_d)
                driven = x if ADJOINT else x * delta
                for n in tl.range(N, disable_licm=True, loop_unroll_factor=1):
                    A = tl.load(parameters + n * channels, mask=channel, other=0)[None, None, :]
                    B = tl.load(rows + R + (n + N if ADJOINT else n), mask=inside, other=0).to(STATE)
                    q = tl.exp(sums * A) * (B * driven)
                    summand = summand_ptr + (k * N + n) * segments * channels
                    if route % 2 == 0:
                        row_q = tl.sum(q, 1, keep_dims=True)
                        tl.store(summand + row, row_q, mask=(h < height) & m_d)
                    else:
                        column_q = tl.sum(q, 0, keep_dims=True)
                        tl.store(summand + column, column_q, mask=(w < width) & m_d)


@triton.jit(do_not_specialize=ANY)
def chain_kernel(
    elapsed_ptr,  # (b, k, segments, d)
    summand_ptr,  # (b, k, n, segments, d)
    parameters_ptr,
    initial_ptr,  # (b, k, n, d)
    carry_ptr,  # (b, k, n, segments, d)
    last_ptr,  # (b, k, n, d)
    channels,
    segments,
    row_segments,
    column_segments,
    codes,
    K: tl.constexpr,
    N: tl.constexpr,
    R,
    HAS_INITIAL: tl.constexpr,
    ADJOINT: tl.constexpr,
    STATE: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """The state before each segment of a route and after the last, from what the segments do to a state."""
    sequence = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2)
    k = (sequence % K).to(tl.int32)
    route = (codes >> (2 * k)) & 3
    n_segments = tl.where(route % 2 == 0, row_segments, column_segments)
    first = tl.where((route >= 2) != ADJOINT, n_segments - 1, 0)
    step = tl.where((route >= 2) != ADJOINT, -1, 1)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = d < channels
    A = tl.load(parameters_ptr + ((1 + k * (N + 1 + R) + n) * channels + d), mask=m_d, other=0)
    elapsed_ptr += sequence * segments * channels + d
    summand_ptr += (sequence * N + n) * segments * channels + d
    carry_ptr += (sequence * N + n) * segments * channels + d
    ends = (sequence * N + n) * channels + d
    state = tl.zeros((BD,), STATE)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + ends, mask=m_d, other=0)
    tl.store(carry_ptr + first * channels, state, mask=m_d)
    s = tl.arange(0, BS)[:, None]
    for start in range(0, n_segments, BS):
        at = (first + step * (start + s)) * channels
        exists = (start + s < n_segments) & m_d[None, :]
        p = tl.exp(tl.load(elapsed_ptr[None, :] + at, mask=exists, other=0) * A[None, :])
        q = tl.load(summand_ptr[None, :] + at, mask=exists, other=0)
        p, q = tl.associative_scan((p, q), 0, compose)
        after = q + p * state[None, :]
        following = (start + s + 1 < n_segments) & m_d[None, :]
        tl.store(carry_ptr[None, :] + at + step * channels, after, mask=following)
        state = tl.sum(tl.where(s == BS - 1, after, 0), 0)
    tl.store(last_ptr + ends, state, mask=m_d)


@triton.jit(do_not_specialize=ANY)
def output_kernel(
    x_ptr,  # (b, h, w, d)
    delta_ptr,
    rows_ptr,
    parameters_ptr,
    carry_ptr,  # (b, k, n, segments, d); WHOLE: the initial state, (b, k, n, d)
    y_ptr,  # (b, h, w, d)
    last_ptr,  # (b, k, n, d)
    row_p,
    row_k,
    height,
    width,
    channels,
    blocks,
    segments,
    codes,
    K: tl.constexpr,
    N: tl.constexpr,
    R,
    LOW_RANK: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    STATE: tl.constexpr,
    TILES: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """y of the tile, and with WHOLE the last state."""
    image, first = first_tile(height, width, TILES, TH, TW)
    x_ptr += image * height * width * channels
    rows_ptr += image * height * width * row_p
    delta_ptr += image * height * width * K * channels
    y_ptr += image * height * width * channels
    carry_ptr += image * K * N * (1 if WHOLE else segments) * channels
    last_ptr += image * K * N * channels
    for block in tl.range(blocks, disable_licm=True, loop_unroll_factor=1):
        d = (tl.program_id(1) * blocks + block) * BD + tl.arange(0, BD)
        channel = within(d, channels, EVEN)
        m_d = channel[None, None, :]
        for i in tl.range(TILES, disable_licm=True, loop_unroll_factor=1):
            tile = first + i
            h, w = positions(tile, width, TH, TW)
            inside = (h < height) & (w < width)
            position = h * width + w
            # Positions beyond the image may load any state: their step size is 0.
            row = row_segments(tile, tl.minimum(h, height - 1), width, TW) * channels
            column = column_segments(tile, tl.minimum(w, width - 1), height, width, TH, TW) * channels
            o_x = position * channels + d[None, None, :]
            x = tl.load(x_ptr + o_x, mask=inside & m_d, other=0).to(STATE)
            y = x * tl.load(parameters_ptr + d, mask=channel, other=0)[None, None, :]
            for k in tl.range(K, disable_licm=True, loop_unroll_factor=1):
                route = (codes >> (2 * k)) & 3
                rows = rows_ptr + (k * row_k + position * row_p)
                parameters = parameters_ptr + (1 + k * (N + 1 + R)) * channels + d
                delta, _ = step_sizes(
                    rows if LOW_RANK else delta_ptr + (position * K + k) * channels,
                    parameters,
                    d,
                    channel,
                    inside,
                    channels,
                    N,
                    R,
                    LOW_RANK,
                    SOFTPLUS,
                    STATE,
                )
                for n in tl.range(N, disable_licm=True, loop_unroll_factor=1):
                    A = tl.load(parameters + n * channels, mask=channel, other=0)[None, None, :]
                    a = tl.exp(delta * A)
                    b = delta * x * tl.load(rows + R + n, mask=inside, other=0).to(STATE)
                    states = carry_ptr + (k * N + n) * (1 if WHOLE else segments) * channels
                    if WHOLE:
                        sums = sums_of(delta, route, False)
                        b += a * states_between(delta, b, A, states + d, channel, sums, route, HAS_CARRY)
                    else:
                        b += a * carry_in(states + d[None, None, :], row, column, m_d, route, TH, TW)
                    q = states_of(a, b, route)
                    y += q * tl.load(rows + R + N + n, mask=inside, other=0).to(STATE)
                    if WHOLE:
                        final = at_end(q, h, w, height, width, route)
                        tl.store(last_ptr + ((k * N + n) * channels + d), final, mask=channel)
            tl.store(y_ptr + o_x, y, mask=inside & m_d)


@triton.jit
def carry_in(states, row, column, m_d, route, TH: tl.constexpr, TW: tl.constexpr):
    """The state before each segment at the segment's first position, else 0; (TH, TW, BD)."""
    if route % 2 == 0:
        row_state = tl.load(states + row, mask=m_d, other=0)
        state = tl.where(tl.arange(0, TW)[None, :, None] == tl.where(route == 0, 0, TW - 1), row_state, 0)
    else:
        column_state = tl.load(states + column, mask=m_d, other=0)
        state = tl.where(tl.arange(0, TH)[:, None, None] == tl.where(route == 1, 0, TH - 1), column_state, 0)
    return state


@triton.jit
def states_between(delta, b, A, initial, channel, sums, route, HAS_INITIAL: tl.constexpr):
    """`carry_in` of an image that is one tile, from its own segments."""
    b = tl.exp(sums * A) * b
    first = tl.zeros((delta.shape[2],), delta.dtype)
    if HAS_INITIAL:
        first = tl.load(initial, mask=channel, other=0)
    if route % 2 == 0:
        state = along_segments(delta, b, A, first, route == 2, 1)
    else:
        state = along_segments(delta, b, A, first, route == 3, 0)
    return state


@triton.jit
def along_segments(delta, b, A, first, reversed, AXIS: tl.constexpr):
    """`states_between` for segments along an axis."""
    ACROSS: tl.constexpr = 1 - AXIS
    r = tl.exp(tl.sum(delta, AXIS, keep_dims=True) * A)
    s = tl.sum(b, AXIS, keep_dims=True)
    segment = tl.expand_dims(tl.expand_dims(tl.arange(0, delta.shape[ACROSS]), AXIS), 2)
    step = tl.expand_dims(tl.expand_dims(tl.arange(0, delta.shape[AXIS]), ACROSS), 2)
    p = tl.full(r.shape, 1, r.dtype)
    q = tl.where(segment == tl.where(reversed, delta.shape[ACROSS] - 1, 0), first[None, None, :], 0)
    q = tl.broadcast_to(q, r.shape)
    if reversed:
        _, q, _, _ = tl.associative_scan((p, q, r, s), ACROSS, compose_last, reverse=True)
    else:
        _, q, _, _ = tl.associative_scan((p, q, r, s), ACROSS, compose_last, reverse=False)
    return tl.where(step == tl.where(reversed, delta.shape[AXIS] - 1, 0), q, 0)


@triton.jit
def at_end(t, h, w, height, width, route):
    """t (TH, TW, BD) at the route's last position, (BD,)."""
    end = (h == tl.where(route < 2, height - 1, 0)) & (w == tl.where(route < 2, width - 1, 0))
    return tl.sum(tl.sum(tl.where(end, t, 0), 0), 0)


@triton.jit(do_not_specialize=[*ANY, "x_ptr", "grad_y_ptr", "grad_x_ptr"])
def gradient_kernel(
    x_ptr,  # (b, h, w, d)
    delta_ptr,
    rows_ptr,
    parameters_ptr,
    carry_ptr,  # (b, k, n, segments, d); WHOLE: the initial state, (b, k, n, d)
    adjoint_ptr,  # (b, k, n, segments, d); WHOLE: the gradient of the last state, (b, k, n, d)
    grad_y_ptr,  # (b, h, w, d), contiguous as all below
    grad_x_ptr,  # (b, h, w, d)
    grad_delta_ptr,  # (b, h, w, k, d), without LOW_RANK
    grad_rows_ptr,  # (b, groups, h, w, k, r + n + n), by groups of channels
    shares_ptr,  # (tiles, 1 + k·(n + 1 + r), d): each tile's share of the parameters' gradients
    grad_initial_ptr,  # (b, k, n, d), with WHOLE and HAS_CARRY
    row_p,
    row_k,
    height,
    width,
    channels,
    blocks,
    segments,
    codes,
    K: tl.constexpr,
    N: tl.constexpr,
    R,
    LOW_RANK: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_ADJOINT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    STATE: tl.constexpr,
    TILES: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """The gradients of the tile; those that sum over channels or tiles as this program's share of the sum."""
    image, tile = first_tile(height, width, TILES, TH, TW)
    h, w = positions(tile, width, TH, TW)
    inside = (h < height) & (w < width)
    position = h * width + w
    x_ptr += image * height * width * channels
    rows_ptr += image * height * width * row_p
    delta_ptr += image * height * width * K * channels
    grad_y_ptr += image * height * width * channels
    grad_x_ptr += image * height * width * channels
    grad_delta_ptr += image * height * width * K * channels
    grad_rows_ptr += (image * tl.num_programs(1) + tl.program_id(1)) * (height * width * K * (R + 2 * N))
    shares_ptr += tl.program_id(0).to(tl.int64) * (1 + K * (N + 1 + R)) * channels
    carry_ptr += image * K * N * (1 if WHOLE else segments) * channels
    adjoint_ptr += image * K * N * (1 if WHOLE else segments) * channels
    grad_initial_ptr += image * K * N * channels
    # Positions beyond the image may load any state: their step size is 0.
    row = row_segments(tile, tl.minimum(h, height - 1), width, TW) * channels
    column = column_segments(tile, tl.minimum(w, width - 1), height, width, TH, TW) * channels
    for block in tl.range(blocks, disable_licm=True, loop_unroll_factor=1):
        d = (tl.program_id(1) * blocks + block) * BD + tl.arange(0, BD)
        channel = within(d, channels, EVEN)
        m_d = channel[None, None, :]
        o_x = position * channels + d[None, None, :]
        x = tl.load(x_ptr + o_x, mask=inside & m_d, other=0).to(STATE)
        grad_y = tl.load(grad_y_ptr + o_x, mask=inside & m_d, other=0).to(STATE)
        D = tl.load(parameters_ptr + d, mask=channel, other=0)[None, None, :]
        grad_x = grad_y * D
        share = tl.sum(tl.sum(grad_y * x, 0), 0)
        tl.store(shares_ptr + d, share, mask=channel)
        rows = rows_ptr + position * row_p  # moved on by route: from k it would cost AMD scalar registers
        for k in tl.range(K, disable_licm=True, loop_unroll_factor=1):
            route = (codes >> (2 * k)) & 3
            parameters = parameters_ptr + (1 + k * (N + 1 + R)) * channels + d
            in_delta = (position * K + k) * channels
            delta, slope = step_sizes(
                rows if LOW_RANK else delta_ptr + in_delta,
                parameters,
                d,
                channel,
                inside,
                channels,
                N,
                R,
                LOW_RANK,
                SOFTPLUS,
                STATE,
            )
            grad_delta = tl.zeros((TH, TW, BD), STATE)
            grad_rows = grad_rows_ptr + (position * K + k) * (R + 2 * N)
            shares = shares_ptr + (1 + k * (N + 1 + R)) * channels + d
            for n in tl.range(N, disable_licm=True, loop_unroll_factor=1):
                A = tl.load(parameters + n * channels, mask=channel, other=0)[None, None, :]
                B = tl.load(rows + R + n, mask=inside, other=0).to(STATE)
                C = tl.load(rows + R + N + n, mask=inside, other=0).to(STATE)
                a = tl.exp(delta * A)
                b = delta * B * x
                states = carry_ptr + (k * N + n) * (1 if WHOLE else segments) * channels
                if WHOLE:
                    sums = sums_of(delta, route, False)
                    before = states_between(delta, b, A, states + d, channel, sums, route, HAS_CARRY)
                else:
                    before = carry_in(states + d[None, None, :], row, column, m_d, route, TH, TW)
                decayed = decayed_states_of(a, a * before, b, route)
                add_to(
                    grad_rows + R + N + n, tl.sum(grad_y * (decayed + b), 2, keep_dims=True), inside, block
                )
                c = C * grad_y
                states = adjoint_ptr + (k * N + n) * (1 if WHOLE else segments) * channels
                if WHOLE:
                    sums = sums_of(delta, route, True)
                    c += states_between(delta, c, A, states + d, channel, sums, route ^ 2, HAS_ADJOINT)
                else:
                    c += carry_in(states + d[None, None, :], row, column, m_d, route ^ 2, TH, TW)
                g = adjoint_states_of(a, c, route)
                if WHOLE and HAS_CARRY:
                    first = at_end(a * g, h, w, height, width, route ^ 2)
                    tl.store(grad_initial_ptr + ((k * N + n) * channels + d), first, mask=channel)
                decayed *= g
                share = tl.sum(tl.sum(decayed * delta, 0), 0)
                tl.store(shares + n * channels, share, mask=channel)
                grad_delta += decayed * A + g * (B * x)
                g *= delta
                grad_x += g * B
                add_to(grad_rows + R + n, tl.sum(g * x, 2, keep_dims=True), inside, block)
            grad_delta *= slope
            share = tl.sum(tl.sum(grad_delta, 0), 0)
            tl.store(shares + N * channels, share, mask=channel)
            if LOW_RANK:
                for r in tl.range(R, disable_licm=True, loop_unroll_factor=1):
                    share = tl.sum(
                        tl.sum(grad_delta * tl.load(rows + r, mask=inside, other=0).to(STATE), 0), 0
                    )
                    tl.store(shares + (N + 1 + r) * channels, share, mask=channel)
                    weight = tl.load(parameters + (N + 1 + r) * channels, mask=channel, other=0)
                    add_to(
                        grad_rows + r,
                        tl.sum(grad_delta * weight[None, None, :], 2, keep_dims=True),
                        inside,
                        block,
                    )
            else:
                tl.store(grad_delta_ptr + in_delta + d[None, None, :], grad_delta, mask=inside & m_d)
            rows += row_k
        tl.store(grad_x_ptr + o_x, grad_x, mask=inside & m_d)
        tl.debug_barrier()  # the next block of channels adds to the rows stored here


@triton.jit
def add_to(pointers, value, mask, block):
    """Store a value; from the second block of channels on, add it to the stored one instead."""
    if block > 0:  # not a mask: on AMD it would occupy two scalar registers through all loops
        value += tl.load(pointers, mask=mask, other=0)
    tl.store(pointers, value, mask=mask)
