"""The Triton kernels of the engine `triton`; imported with the first call that needs them.

B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta.

A program owns a tile of an image, TH × TW positions, and BD channels. It loads x once and walks all routes
over it: within a tile a route is a scan along its rows or its columns, the *segments* of the route, and what
a segment needs from outside is one state. So a first pass over the tiles, `summary_kernel`, stores what each
segment does to a state (a factor and a summand), `chain_kernel` turns these into the state before each
segment, and `output_kernel` forms y. An image within one tile is one segment and needs the last pass alone.

The backward is the same walk with the routes reversed: the adjoint state u_t = a_t (C_t dy_t + u_{t+1}) goes
through `summary_kernel` and `chain_kernel`, and `gradient_kernel` forms every gradient from both states.

No memory is stored to by two programs, so that no result depends on their order. Offsets within an image are
int32, those of images int64.
"""

import triton
import triton.language as tl

SIZES = [
    *("batch", "height", "width", "codes", "K", "N", "R", "segments", "row_segments", "column_segments"),
    *("delta_p", "delta_k", "B_p", "B_k", "C_p", "C_k"),
]
"""Arguments of which no kernel has a variant for a multiple of 16, or for 1."""

FEW = ["delta_ptr", "B_ptr", "C_ptr"]
"""Pointers that may have any alignment: as a rule these are parts of one tensor."""


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
def softplus(z):
    """log(1 + exp(z)) without overflow, to the last digits where exp(z) is small too; and its derivative."""
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    # The rounding of u is taken out by the quotient: log(u)·e/(u - 1) is log(1 + e) to a few ulp.
    small = tl.where(u == 1, e, tl.log(u) * (e / tl.where(u == 1, 1, u - 1)))
    return tl.maximum(z, 0) + small, tl.where(z >= 0, 1, e) / u


@triton.jit
def along(
    t, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr
):
    """(TH, TW, BD) as it is, its segments along dimension 1 or 0; with WHOLE as one, (TH·TW, BD)."""
    if WHOLE:
        if COLUMNS:
            t = tl.permute(t, (1, 0, 2))
        t = tl.reshape(t, (TH * TW, BD))
    return t


@triton.jit
def in_place(
    t, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BD: tl.constexpr
):
    """The inverse of `along`."""
    if WHOLE:
        if COLUMNS:  # noqa: SIM108  (the two are of different shapes between)
            t = tl.permute(tl.reshape(t, (TW, TH, BD)), (1, 0, 2))
        else:
            t = tl.reshape(t, (TH, TW, BD))
    return t


@triton.jit
def scan_states(
    a,
    b,
    COLUMNS: tl.constexpr,
    REVERSED: tl.constexpr,
    WHOLE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """`states_of` for one route."""
    AXIS: tl.constexpr = 0 if WHOLE or COLUMNS else 1
    elements = (
        along(a, COLUMNS, WHOLE, TH, TW, BD),
        along(b, COLUMNS, WHOLE, TH, TW, BD),
    )
    p, q = tl.associative_scan(elements, AXIS, compose, reverse=REVERSED)
    return in_place(p, COLUMNS, WHOLE, TH, TW, BD), in_place(q, COLUMNS, WHOLE, TH, TW, BD)


@triton.jit
def states_of(
    a,
    b,
    route,
    WHOLE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """(p, q) of h_t = p h + q, h the state before the segment, from (a_t, b_t); all (TH, TW, BD)."""
    if route == 0:
        p, q = scan_states(a, b, False, False, WHOLE, TH, TW, BD)
    elif route == 1:
        p, q = scan_states(a, b, True, False, WHOLE, TH, TW, BD)
    elif route == 2:
        p, q = scan_states(a, b, False, True, WHOLE, TH, TW, BD)
    else:
        p, q = scan_states(a, b, True, True, WHOLE, TH, TW, BD)
    return p, q


@triton.jit
def scan_decayed_states(
    a,
    first,
    b,
    COLUMNS: tl.constexpr,
    REVERSED: tl.constexpr,
    WHOLE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """`decayed_states_of` for one route."""
    AXIS: tl.constexpr = 0 if WHOLE or COLUMNS else 1
    elements = (
        along(a, COLUMNS, WHOLE, TH, TW, BD),
        along(first, COLUMNS, WHOLE, TH, TW, BD),
        along(b, COLUMNS, WHOLE, TH, TW, BD),
    )
    _, q, _ = tl.associative_scan(elements, AXIS, compose_before, reverse=REVERSED)
    return in_place(q, COLUMNS, WHOLE, TH, TW, BD)


@triton.jit
def decayed_states_of(
    a,
    first,
    b,
    route,
    WHOLE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """a_t h_{t-1} from a_t, that of the first position of each segment (else 0), and b_t."""
    if route == 0:
        q = scan_decayed_states(a, first, b, False, False, WHOLE, TH, TW, BD)
    elif route == 1:
        q = scan_decayed_states(a, first, b, True, False, WHOLE, TH, TW, BD)
    elif route == 2:
        q = scan_decayed_states(a, first, b, False, True, WHOLE, TH, TW, BD)
    else:
        q = scan_decayed_states(a, first, b, True, True, WHOLE, TH, TW, BD)
    return q


@triton.jit
def scan_adjoint_states(
    a,
    c,
    COLUMNS: tl.constexpr,
    REVERSED: tl.constexpr,
    WHOLE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """`adjoint_states_of` for one route."""
    one = tl.full(a.shape, 1, a.dtype)
    AXIS: tl.constexpr = 0 if WHOLE or COLUMNS else 1
    elements = (
        along(one, COLUMNS, WHOLE, TH, TW, BD),
        along(c, COLUMNS, WHOLE, TH, TW, BD),
        along(a, COLUMNS, WHOLE, TH, TW, BD),
    )
    _, q, _ = tl.associative_scan(elements, AXIS, compose_adjoint, reverse=not REVERSED)
    return in_place(q, COLUMNS, WHOLE, TH, TW, BD)


@triton.jit
def adjoint_states_of(
    a,
    c,
    route,
    WHOLE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """c_t + u_{t+1} from a_t and c_t, to which the adjoint state after each segment is added."""
    if route == 0:
        q = scan_adjoint_states(a, c, False, False, WHOLE, TH, TW, BD)
    elif route == 1:
        q = scan_adjoint_states(a, c, True, False, WHOLE, TH, TW, BD)
    elif route == 2:
        q = scan_adjoint_states(a, c, False, True, WHOLE, TH, TW, BD)
    else:
        q = scan_adjoint_states(a, c, True, True, WHOLE, TH, TW, BD)
    return q


@triton.jit
def step_sizes(
    rows,  # (TH, TW, 1) pointers to delta's rows
    bias,  # (BD,) pointers
    weight,  # (BD,) pointers
    inside,  # (TH, TW, 1)
    known,  # (BD,)
    channels,
    R,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    STATE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """softplus(delta + bias) and its derivative, (TH, TW, BD), 0 outside; LOW_RANK: from delta's factors."""
    if not LOW_RANK:
        d = tl.program_id(1) * BD + tl.arange(0, BD)
        z = tl.load(rows + d[None, None, :], mask=inside & known[None, None, :], other=0).to(STATE)
    else:
        z = tl.zeros((TH, TW, BD), STATE)
        for r in tl.range(R, disable_licm=True, loop_unroll_factor=1):
            low = tl.load(rows + r, mask=inside, other=0).to(STATE)
            z += low * tl.load(weight + r * channels, mask=known, other=0)[None, None, :]
    if HAS_BIAS:
        z += tl.load(bias, mask=known, other=0)[None, None, :]
    slope = tl.full((TH, TW, BD), 1, STATE)
    if SOFTPLUS:
        z, slope = softplus(z)
    return tl.where(inside, z, 0), tl.where(inside, slope, 0)


@triton.jit
def tile_of(height, width, TH: tl.constexpr, TW: tl.constexpr):
    """The program's image, and its rows (TH, 1, 1) and columns (1, TW, 1)."""
    tiles_w = tl.cdiv(width, TW)
    tiles = tiles_w * tl.cdiv(height, TH)
    program = tl.program_id(0)
    h = program % tiles // tiles_w * TH + tl.arange(0, TH)[:, None, None]
    w = program % tiles_w * TW + tl.arange(0, TW)[None, :, None]
    return (program // tiles).to(tl.int64), h, w


@triton.jit
def last_of(t, end, AXIS: tl.constexpr):
    """t at the one position along an axis where `end` is."""
    return tl.sum(tl.where(end, t, 0), AXIS, keep_dims=True)


@triton.jit
def row_segments_of(h, height, width, route, TW: tl.constexpr):
    """The place in the route of the tile's rows, (TH, 1, 1)."""
    across = tl.cdiv(width, TW)
    segment = h * across + tl.program_id(0) % across
    return tl.where(route >= 2, height * across - 1 - segment, segment)


@triton.jit
def column_segments_of(w, height, width, route, TH: tl.constexpr, TW: tl.constexpr):
    """The place in the route of the tile's columns, (1, TW, 1)."""
    down = tl.cdiv(height, TH)
    segment = w * down + tl.program_id(0) // tl.cdiv(width, TW) % down
    return tl.where(route >= 2, width * down - 1 - segment, segment)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=FEW)
def summary_kernel(
    x_ptr,  # (B, H, W, D); ADJOINT: the gradient of y
    delta_ptr,
    A_ptr,  # (K, N, D)
    B_ptr,  # (B, H, W, K, N); ADJOINT: C
    bias_ptr,  # (K, D)
    weight_ptr,  # (K, R, D)
    factor_ptr,  # (B, K, segments, N, D)
    summand_ptr,  # (B, K, segments, N, D)
    x_p,
    delta_p,
    delta_k,
    B_p,
    B_k,
    height,
    width,
    channels,
    segments,
    codes,
    K,
    N,
    R,
    LOW_RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ADJOINT: tl.constexpr,
    STATE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """What each segment of the tile does to a state; ADJOINT: to an adjoint state, the route reversed."""
    image, h, w = tile_of(height, width, TH, TW)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    channel = d < channels
    known = channel[None, None, :]
    inside = (h < height) & (w < width)
    position = h * width + w
    of_image = image * height * width
    x = tl.load(
        x_ptr + of_image * x_p + (position * x_p + d[None, None, :]), mask=inside & known, other=0
    ).to(STATE)
    for k in tl.range(K, disable_licm=True, loop_unroll_factor=1):
        route = (codes >> (2 * k)) & 3
        if ADJOINT:
            route = route ^ 2
        delta, _ = step_sizes(
            delta_ptr + of_image * delta_p + k * delta_k + position * delta_p,
            bias_ptr + k * channels + d,
            weight_ptr + k * R * channels + d,
            inside,
            channel,
            channels,
            R,
            LOW_RANK,
            HAS_BIAS,
            SOFTPLUS,
            STATE,
            TH,
            TW,
            BD,
        )
        of_route = (image * K + k) * segments * N * channels
        for n in tl.range(N, disable_licm=True, loop_unroll_factor=1):
            A = tl.load(A_ptr + (k * N + n) * channels + d, mask=channel, other=0)[None, None, :]
            B_rows = B_ptr + of_image * B_p + k * B_k + n + position * B_p
            B = tl.load(B_rows, mask=inside, other=0).to(STATE)
            a = tl.exp(delta * A)
            p, q = states_of(a, (a if ADJOINT else delta) * B * x, route, False, TH, TW, BD)
            if route % 2 == 0:
                row = (row_segments_of(h, height, width, route, TW) * N + n) * channels + d[None, None, :]
                row_end = tl.arange(0, TW)[None, :, None] == tl.where(route == 0, TW - 1, 0)
                there = (h < height) & known
                tl.store(factor_ptr + of_route + row, last_of(p, row_end, 1), mask=there)
                tl.store(summand_ptr + of_route + row, last_of(q, row_end, 1), mask=there)
            else:
                column = (column_segments_of(w, height, width, route, TH, TW) * N + n) * channels + d[
                    None, None, :
                ]
                column_end = tl.arange(0, TH)[:, None, None] == tl.where(route == 1, TH - 1, 0)
                here = (w < width) & known
                tl.store(factor_ptr + of_route + column, last_of(p, column_end, 0), mask=here)
                tl.store(summand_ptr + of_route + column, last_of(q, column_end, 0), mask=here)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=FEW)
def chain_kernel(
    factor_ptr,  # (B, K, segments, N, D)
    summand_ptr,  # (B, K, segments, N, D)
    initial_ptr,  # (B, K, N, D)
    carry_ptr,  # (B, K, segments, N, D)
    last_ptr,  # (B, K, N, D)
    channels,
    segments,
    row_segments,
    column_segments,
    codes,
    K,
    N,
    HAS_INITIAL: tl.constexpr,
    STATE: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
):
    """The state before each segment of a route and after the last, from what the segments do to a state."""
    sequence = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2)
    k = (sequence % K).to(tl.int32)
    own = tl.where(((codes >> (2 * k)) & 1) == 1, column_segments, row_segments)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    known = d < channels
    base = sequence * segments * N * channels + n * channels
    ends = (sequence * N + n) * channels + d
    state = tl.zeros((BD,), STATE)
    if HAS_INITIAL:
        state = tl.load(initial_ptr + ends, mask=known, other=0)
    tl.store(carry_ptr + base + d, state, mask=known)
    s = tl.arange(0, BS)
    for start in range(0, own, BS):
        at = base + ((start + s) * N * channels)[:, None] + d[None, :]
        exists = (start + s < own)[:, None] & known[None, :]
        p = tl.load(factor_ptr + at, mask=exists, other=1)
        q = tl.load(summand_ptr + at, mask=exists, other=0)
        p, q = tl.associative_scan((p, q), 0, compose)
        after = q + p * state[None, :]
        tl.store(carry_ptr + at + N * channels, after, mask=(start + s + 1 < own)[:, None] & known[None, :])
        state = tl.sum(tl.where((s == BS - 1)[:, None], after, 0), 0)
    tl.store(last_ptr + ends, state, mask=known)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=FEW)
def output_kernel(
    x_ptr,  # (B, H, W, D)
    delta_ptr,
    A_ptr,  # (K, N, D)
    B_ptr,
    C_ptr,
    D_ptr,  # (D,), the sum over routes
    bias_ptr,  # (K, D)
    weight_ptr,  # (K, R, D)
    carry_ptr,  # (B, K, segments, N, D); WHOLE: the initial state, (B, K, N, D)
    y_ptr,  # (B, H, W, D)
    last_ptr,  # (B, K, N, D)
    x_p,
    delta_p,
    delta_k,
    B_p,
    B_k,
    C_p,
    C_k,
    height,
    width,
    channels,
    segments,
    codes,
    K,
    N,
    R,
    LOW_RANK: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    STATE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """y of the tile, and with WHOLE the last state."""
    image, h, w = tile_of(height, width, TH, TW)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    channel = d < channels
    known = channel[None, None, :]
    inside = (h < height) & (w < width)
    position = h * width + w
    of_image = image * height * width
    x = tl.load(
        x_ptr + of_image * x_p + (position * x_p + d[None, None, :]), mask=inside & known, other=0
    ).to(STATE)
    y = tl.zeros((TH, TW, BD), STATE)
    for k in tl.range(K, disable_licm=True, loop_unroll_factor=1):
        route = (codes >> (2 * k)) & 3
        delta, _ = step_sizes(
            delta_ptr + of_image * delta_p + k * delta_k + position * delta_p,
            bias_ptr + k * channels + d,
            weight_ptr + k * R * channels + d,
            inside,
            channel,
            channels,
            R,
            LOW_RANK,
            HAS_BIAS,
            SOFTPLUS,
            STATE,
            TH,
            TW,
            BD,
        )
        of_route = image * K + k
        for n in tl.range(N, disable_licm=True, loop_unroll_factor=1):
            A = tl.load(A_ptr + (k * N + n) * channels + d, mask=channel, other=0)[None, None, :]
            B_rows = B_ptr + of_image * B_p + k * B_k + n + position * B_p
            B = tl.load(B_rows, mask=inside, other=0).to(STATE)
            a = tl.exp(delta * A)
            b = delta * B * x
            if HAS_CARRY:
                carry = carry_ptr + of_route * segments * N * channels
                b += a * carry_in(
                    carry, n, h, w, d, height, width, channels, route, N, STATE, WHOLE, TH, TW, BD
                )
            _, q = states_of(a, b, route, WHOLE, TH, TW, BD)
            C_rows = C_ptr + of_image * C_p + k * C_k + n + position * C_p
            y += tl.load(C_rows, mask=inside, other=0).to(STATE) * q
            if WHOLE:
                final = at_end(q, h, w, height, width, route)
                tl.store(last_ptr + (of_route * N + n) * channels + d, final, mask=channel)
    if HAS_D:
        y += x * tl.load(D_ptr + d, mask=channel, other=0)[None, None, :]
    tl.store(
        y_ptr + of_image * channels + (position * channels + d[None, None, :]),
        y,
        mask=inside & known,
    )


@triton.jit
def carry_in(
    carry_ptr,
    n,
    h,
    w,
    d,
    height,
    width,
    channels,
    route,
    N,
    STATE: tl.constexpr,
    WHOLE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """The state before each segment at the segment's first position, else 0; (TH, TW, BD)."""
    known = (d < channels)[None, None, :]
    i = tl.arange(0, TH)[:, None, None]
    j = tl.arange(0, TW)[None, :, None]
    if WHOLE:
        first = (i == tl.where(route < 2, 0, TH - 1)) & (j == tl.where(route < 2, 0, TW - 1))
        state = tl.load(carry_ptr + n * channels + d[None, None, :], mask=known, other=0)
        states = tl.where(first, state, 0)
    elif route % 2 == 0:
        row = (row_segments_of(h, height, width, route, TW) * N + n) * channels + d[None, None, :]
        row_state = tl.load(carry_ptr + row, mask=(h < height) & known, other=0)
        states = tl.where(j == tl.where(route == 0, 0, TW - 1), row_state, 0)
    else:
        column = (column_segments_of(w, height, width, route, TH, TW) * N + n) * channels + d[None, None, :]
        column_state = tl.load(carry_ptr + column, mask=(w < width) & known, other=0)
        states = tl.where(i == tl.where(route == 1, 0, TH - 1), column_state, 0)
    return states


@triton.jit
def at_end(t, h, w, height, width, route):
    """t (TH, TW, BD) at the route's last position, (BD,)."""
    end = (h == tl.where(route < 2, height - 1, 0)) & (w == tl.where(route < 2, width - 1, 0))
    return tl.sum(tl.sum(tl.where(end, t, 0), 0), 0)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=FEW)
def gradient_kernel(
    x_ptr,  # (B, H, W, D)
    delta_ptr,
    A_ptr,  # (K, N, D)
    B_ptr,
    C_ptr,
    D_ptr,  # (D,), the sum over routes
    bias_ptr,  # (K, D)
    weight_ptr,  # (K, R, D)
    carry_ptr,  # (B, K, segments, N, D); WHOLE: the initial state, (B, K, N, D)
    adjoint_ptr,  # (B, K, segments, N, D); WHOLE: the gradient of the last state, (B, K, N, D)
    grad_y_ptr,  # (B, H, W, D), contiguous as all below
    grad_x_ptr,  # (B, H, W, D)
    grad_delta_ptr,  # (B, H, W, K, D), without LOW_RANK
    rows_ptr,  # (blocks, B, H, W, K, N + N + R): of B, C and delta, by blocks of channels
    shares_ptr,  # (tiles, K, N + 1 + R, D): of A, delta_bias and delta_weight, by tiles
    grad_D_ptr,  # (tiles, D), of a route
    grad_initial_ptr,  # (B, K, N, D)
    x_p,
    delta_p,
    delta_k,
    B_p,
    B_k,
    C_p,
    C_k,
    batch,
    height,
    width,
    channels,
    segments,
    codes,
    K,
    N,
    R,
    LOW_RANK: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_ADJOINT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    WHOLE: tl.constexpr,
    STATE: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BD: tl.constexpr,
):
    """The gradients of the tile; those that sum over channels or tiles as this program's share of the sum."""
    image, h, w = tile_of(height, width, TH, TW)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    channel = d < channels
    known = channel[None, None, :]
    inside = (h < height) & (w < width)
    position = h * width + w
    of_image = image * height * width
    x = tl.load(
        x_ptr + of_image * x_p + (position * x_p + d[None, None, :]), mask=inside & known, other=0
    ).to(STATE)
    own = position * channels + d[None, None, :]
    grad_y = tl.load(grad_y_ptr + of_image * channels + own, mask=inside & known, other=0).to(STATE)
    grad_x = tl.zeros((TH, TW, BD), STATE)
    tile = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * batch * height * width + of_image  # in sums over blocks of channels
    for k in tl.range(K, disable_licm=True, loop_unroll_factor=1):
        route = (codes >> (2 * k)) & 3
        delta_rows = delta_ptr + of_image * delta_p + k * delta_k + position * delta_p
        delta, slope = step_sizes(
            delta_rows,
            bias_ptr + k * channels + d,
            weight_ptr + k * R * channels + d,
            inside,
            channel,
            channels,
            R,
            LOW_RANK,
            HAS_BIAS,
            SOFTPLUS,
            STATE,
            TH,
            TW,
            BD,
        )
        grad_delta = tl.zeros((TH, TW, BD), STATE)
        of_route = image * K + k
        of_states = of_route * segments * N * channels
        rows = rows_ptr + row * K * (2 * N + R) + k * (2 * N + R) + position * (K * (2 * N + R))
        shares = shares_ptr + (tile * K + k) * (N + 1 + R) * channels + d
        for n in tl.range(N, disable_licm=True, loop_unroll_factor=1):
            A = tl.load(A_ptr + (k * N + n) * channels + d, mask=channel, other=0)[None, None, :]
            B_rows = B_ptr + of_image * B_p + k * B_k + n + position * B_p
            C_rows = C_ptr + of_image * C_p + k * C_k + n + position * C_p
            B = tl.load(B_rows, mask=inside, other=0).to(STATE)
            C = tl.load(C_rows, mask=inside, other=0).to(STATE)
            a = tl.exp(delta * A)
            b = delta * B * x
            before = tl.zeros((TH, TW, BD), STATE)
            if HAS_CARRY:
                carry = carry_ptr + of_states
                before = carry_in(
                    carry, n, h, w, d, height, width, channels, route, N, STATE, WHOLE, TH, TW, BD
                )
            decayed = decayed_states_of(a, a * before, b, route, WHOLE, TH, TW, BD)
            tl.store(rows + N + n, tl.sum(grad_y * (decayed + b), 2, keep_dims=True), mask=inside)
            c = C * grad_y
            if HAS_ADJOINT:
                after = adjoint_ptr + of_states
                c += carry_in(
                    after, n, h, w, d, height, width, channels, route ^ 2, N, STATE, WHOLE, TH, TW, BD
                )
            g = adjoint_states_of(a, c, route, WHOLE, TH, TW, BD)
            tl.store(rows + n, tl.sum(g * delta * x, 2, keep_dims=True), mask=inside)
            if WHOLE:
                first = at_end(a * g, h, w, height, width, route ^ 2)
                tl.store(grad_initial_ptr + (of_route * N + n) * channels + d, first, mask=channel)
            grad_x += g * delta * B
            decayed *= g
            share = tl.sum(tl.sum(decayed * delta, 0), 0)
            tl.store(shares + n * channels, share, mask=channel)
            grad_delta += decayed * A + g * B * x
        grad_delta *= slope
        if HAS_BIAS:
            share = tl.sum(tl.sum(grad_delta, 0), 0)
            tl.store(shares + N * channels, share, mask=channel)
        if LOW_RANK:
            for r in tl.range(R, disable_licm=True, loop_unroll_factor=1):
                low = tl.load(delta_rows + r, mask=inside, other=0).to(STATE)
                of_weight = tl.sum(tl.sum(grad_delta * low, 0), 0)
                tl.store(shares + (N + 1 + r) * channels, of_weight, mask=channel)
                weight = tl.load(weight_ptr + (k * R + r) * channels + d, mask=channel, other=0)[
                    None, None, :
                ]
                of_low = tl.sum(grad_delta * weight, 2, keep_dims=True)
                tl.store(rows + 2 * N + r, of_low, mask=inside)
        else:
            at = ((of_image + position) * K + k) * channels + d[None, None, :]
            tl.store(grad_delta_ptr + at, grad_delta, mask=inside & known)
    if HAS_D:
        grad_x += grad_y * tl.load(D_ptr + d, mask=channel, other=0)[None, None, :]
        share = tl.sum(tl.sum(grad_y * x, 0), 0)
        tl.store(grad_D_ptr + tile * channels + d, share, mask=channel)
    tl.store(grad_x_ptr + of_image * channels + own, grad_x, mask=inside & known)
