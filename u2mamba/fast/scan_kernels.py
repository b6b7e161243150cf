# ruff: noqa: RUF005 (Triton has no starred expressions)
"""Triton kernels of the selective scan: the forward pass, and the functions that it shares with `scan_grads`.

`u2mamba.fast.selective_scan` launches them and explains what they compute.

Glossary: b batch, d channels (rows), n states, L length; Δ after bias and softplus; x = Δ u; g = dy before the gate;
a_t = exp(Δ_t A); dh_t = C_t g_t + e_{t+1} the gradient of h_t, and e_t = a_t dh_t what it hands to step t - 1.

A program is one warp, and every tensor in it has one number per thread: LANES threads along the length times 32 / LANES
rows. A thread computes K steps of R rows by itself (tuples of K tensors, unrolled), so that a step of the recurrence is
one multiply-add, and only the last states are scanned across the lanes (Hillis & Steele 1986). Each thread runs twice:
from zero, and from the state after the lanes before. On sm_90 a step and state takes 12 instructions, backward 32.

Strides s_xy: of tensor x along b, its rows (d or n) and t; they and the length are divided by V, the steps of one load
instruction (s_xt is 1 where V > 1).
"""

from u2mamba.fast import launch
from u2mamba.fast.launch import constexpr, tl, triton

LOG2E, LN2 = (constexpr(1.4426950408889634), constexpr(0.6931471805599453)) if triton else (None, None)


def jit(kernel):
    """`launch.jit` with strides and sizes not specialized, so that one compiled variant serves all lengths."""
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    sizes = ("d", "N", "LV", "chunks", "table", "groups", "size", "splits")
    return launch.jit(*(name for name in names if name.startswith("s_") or name in sizes))(kernel)


@jit
def _zeros(K: constexpr):
    out = ()
    for _ in tl.static_range(K):
        out = out + (tl.zeros([32], tl.float32),)
    return out


@jit
def _load(p, b, row, s_b, s_d, s_t, t, ok, LV, K: constexpr, V: constexpr, MASK: constexpr):
    """Steps t .. t + K - 1 of each thread's row as a tuple of K fp32 tensors, 0 outside and where not ok. With ok =
    None a step outside is any number of the row."""
    p += b * s_b * V  # the offsets from there fit 32 bits
    row = row * s_d * V
    out = ()
    for first in tl.static_range(0, K, V):
        if V == 1:
            at = t + first
            if MASK and ok is None:
                at = tl.minimum(at, LV - 1)  # cheaper than a mask in the loop over the states
            inside = ok & (at < LV) if MASK and ok is not None else None
            at = row + at * s_t
        else:
            at = (t + first)[:, None] + tl.arange(0, V)[None, :]
            inside = (at < LV * V if ok is None else ok[:, None] & (at < LV * V)) if MASK else None
            at = row[:, None] + at
        parts = (tl.load(p + at, mask=inside, other=None if inside is None else 0.0),)
        for s in tl.static_range(3):
            if V >> s > 1:  # parting odd and even steps only renames registers
                even = ()
                odd = ()
                for i in tl.static_range(1 << s):
                    one, two = tl.split(tl.reshape(parts[i], [32, (V >> s) // 2, 2]))
                    even = even + (one,)
                    odd = odd + (two,)
                parts = even + odd
        for i in tl.static_range(V):
            out = out + (tl.reshape(parts[i], [32]).to(tl.float32),)
    return out


@jit
def _store(p, row, x, t, ok, LV, K: constexpr, V: constexpr, MASK: constexpr):
    """The reverse of `_load`, into rows of length L."""
    for first in tl.static_range(0, K, V):
        parts = ()
        for i in tl.static_range(V):
            parts = parts + (tl.reshape(x[first + i].to(p.dtype.element_ty), [32, 1]),)
        for s in tl.static_range(3):
            if V >> s > 1:
                joined = ()
                for i in tl.static_range((V >> s) // 2):
                    pair = tl.join(parts[i], parts[i + (V >> s) // 2])
                    joined = joined + (tl.reshape(pair, [32, 2 << s]),)
                parts = joined
        at = (t + first)[:, None] + tl.arange(0, V)[None, :]
        inside = ok[:, None] & (at < LV * V) if MASK else None
        tl.store(p + (row[:, None] * (LV * V) + at), parts[0], mask=inside)


@jit
def _sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2E))  # a third of the instructions of a division, error 4e-7
    return root * root


@jit
def _delta(
    p, bias, b, row, s_b, s_d, s_t, t, ok, LV,
    K: constexpr, V: constexpr, MASK: constexpr, BIAS: constexpr, SOFTPLUS: constexpr,
):  # fmt: skip
    """Δ of K steps and their sum; zero where there is no step, which then changes no state."""
    raw = _load(p, b, row, s_b, s_d, s_t, t, ok, LV, K, V, MASK)
    shift = 0.0
    if BIAS:
        shift = tl.load(bias + row, mask=ok, other=0.0).to(tl.float32)
    out = ()
    delta_sum = tl.zeros([32], tl.float32)
    for j in tl.static_range(K):
        x = raw[j] + shift
        if SOFTPLUS:
            # max(x, 0) + log1p(w); log1p(w) / w by interpolation in the Chebyshev points of [0, 1], error 2.3e-7
            w = tl.exp2(-tl.abs(x) * LOG2E)
            q = 0.0051261018961668015 * w - 0.029074065387248993
            q = q * w + 0.0775160863995552
            q = q * w - 0.13602247834205627
            q = q * w + 0.19076880812644958
            q = q * w - 0.2483539879322052
            q = q * w + 0.3331812024116516
            q = q * w - 0.4999944567680359
            q = q * w + 0.9999999403953552
            x = q * w + tl.maximum(x, 0.0, tl.PropagateNan.ALL)
        if MASK:
            x = tl.where(ok & (t + j < LV * V), x, 0.0)
        delta_sum += x
        out = out + (x,)
    return out, delta_sum


@jit
def _shift_lanes(x, lane, step: constexpr, LANES: constexpr, REVERSE: constexpr):
    """x of the lane `step` before this one (REVERSE: behind it) in the same row; the lane's own where there is none."""
    at = lane % LANES
    if REVERSE:
        return tl.gather(x, tl.where(at + step < LANES, lane + step, lane), 0)
    return tl.gather(x, tl.where(at >= step, lane - step, lane), 0)


@jit
def _row_sum(x, lane, LANES: constexpr):
    """Sum over the lanes of a row, in all of them."""
    for s in tl.static_range(5):
        if 1 << s < LANES:
            x += tl.gather(x, lane ^ (1 << s), 0)
    return x


@jit
def _lane_scan(end, decay, start, lane, LANES: constexpr, REVERSE: constexpr):
    """The state before each lane: `end` is its last state from a zero start, `start` the state before the first lane.

    `decay`: factor of the lane before. It is set to zero in the first lane, so products beyond the row are zero and the
    scan needs no masks.
    """
    first = lane % LANES == (LANES - 1 if REVERSE else 0)
    x = tl.where(first, start, _shift_lanes(end, lane, 1, LANES, REVERSE))
    p = tl.where(first, 0.0, decay)
    for s in tl.static_range(5):
        if 1 << s < LANES:
            x += p * _shift_lanes(x, lane, 1 << s, LANES, REVERSE)
            if 2 << s < LANES:
                p *= _shift_lanes(p, lane, 1 << s, LANES, REVERSE)
    return x


@jit
def _chunk_states(
    x_ptr, w_ptr, delta, z, A, bias, ends, delta_sums,
    s_xb, s_xd, s_xt, s_wb, s_wn, s_wt, s_db, s_dd, s_dt, s_zb, s_zd, s_zt, d, N, LV, table,
    K: constexpr, LANES: constexpr, R: constexpr, V: constexpr, MASK: constexpr, BIAS: constexpr, SOFTPLUS: constexpr,
    GATE: constexpr, REVERSE: constexpr,
):  # fmt: skip
    """Each chunk from a zero start: its last h (x = u, w = B) or, REVERSE, its first e (x = dy, w = C).

    ends: (b, chunks, table, d), of which the first n of `table` are written; delta_sums: (b, chunks, d), the sum of Δ.
    """
    lane = tl.arange(0, 32)
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    chunk_index = b * tl.num_programs(0) + chunk
    t = chunk * (K * LANES) + lane % LANES * K
    first_row = tl.program_id(1) * (R * (32 // LANES)) + lane // LANES
    dt = ()
    v = ()
    rest = ()
    for i in tl.static_range(R):
        row = first_row + i * (32 // LANES)
        ok = row < d
        step, delta_sum = _delta(delta, bias, b, row, s_db, s_dd, s_dt, t, ok, LV, K, V, MASK, BIAS, SOFTPLUS)
        x = _load(x_ptr, b, row, s_xb, s_xd, s_xt, t, ok, LV, K, V, MASK)
        if GATE:
            gate = _load(z, b, row, s_zb, s_zd, s_zt, t, ok, LV, K, V, MASK)
        for j in tl.static_range(K):
            if GATE:
                v = v + (x[j] * gate[j] * _sigmoid(gate[j]),)
            elif REVERSE:
                v = v + (x[j],)
            else:
                v = v + (x[j] * step[j],)
        dt = dt + step
        ones = tl.zeros([32], tl.float32) + 1.0
        # Δ summed over the lanes still to come
        rest = rest + (_lane_scan(delta_sum, ones, 0.0, lane, LANES, not REVERSE),)
        if not REVERSE:
            total = _row_sum(delta_sum, lane, LANES)
            tl.store(delta_sums + chunk_index * d + row, total, mask=ok & (lane % LANES == 0))
    for k in tl.range(N):
        w = _load(w_ptr, b, lane * 0 + k, s_wb, s_wn, s_wt, t, None, LV, K, V, MASK)
        for i in tl.static_range(R):
            row = first_row + i * (32 // LANES)
            A2 = tl.load(A + row * N + k, mask=row < d, other=0.0) * LOG2E
            s = tl.zeros([32], tl.float32)
            for j in tl.static_range(K):
                if REVERSE:
                    s = (w[K - 1 - j] * v[i * K + K - 1 - j] + s) * tl.exp2(A2 * dt[i * K + K - 1 - j])
                else:
                    s = s * tl.exp2(A2 * dt[i * K + j]) + v[i * K + j] * w[j]
            s = _row_sum(s * tl.exp2(A2 * rest[i]), lane, LANES)
            tl.store(ends + chunk_index * table * d + (k * d + row), s, mask=(row < d) & (lane % LANES == 0))


@jit
def _propagate_chunk_states(ends, delta_sums, A, d, N, chunks, table, UNROLL: constexpr, REVERSE: constexpr):
    """Turns the results of `_chunk_states` into the state at each chunk's start (REVERSE: end), in place; 32 states per
    program."""
    at = tl.program_id(0) * 32 + tl.arange(0, 32)
    ok = at < N * d
    row = at % d
    b = tl.program_id(1).to(tl.int64)
    A2 = tl.load(A + row * N + at // d, mask=ok, other=0.0) * LOG2E
    h = tl.zeros([32], tl.float32)
    for start in range(0, chunks, UNROLL):
        chunk_states = ()
        decay = ()
        for i in tl.static_range(UNROLL):  # all loads before the first store, which they may not pass
            good = ok & (start + i < chunks)
            chunk_index = b * chunks + (chunks - 1 - start - i if REVERSE else start + i)
            chunk_states = chunk_states + (tl.load(ends + chunk_index * (table * d) + at, mask=good, other=0.0),)
            decay = decay + (tl.exp2(A2 * tl.load(delta_sums + chunk_index * d + row, mask=good, other=0.0)),)
        for i in tl.static_range(UNROLL):
            chunk_index = b * chunks + (chunks - 1 - start - i if REVERSE else start + i)
            tl.store(ends + chunk_index * (table * d) + at, h, mask=ok & (start + i < chunks))
            h = h * decay[i] + chunk_states[i]


@jit
def _scan(
    u, delta, A, B, C, D, z, bias, y_ptr, starts,
    s_ub, s_ud, s_ut, s_db, s_dd, s_dt, s_bb, s_bn, s_bt, s_cb, s_cn, s_ct, s_zb, s_zd, s_zt, d, N, LV,
    K: constexpr, LANES: constexpr, R: constexpr, V: constexpr, MASK: constexpr, BIAS: constexpr, SOFTPLUS: constexpr,
    GATE: constexpr, SKIP: constexpr, STARTS: constexpr,
):  # fmt: skip
    """y (b, d, L) of one chunk and R * 32 / LANES rows; starts: (b, chunks, n, d), h at the chunk's start."""
    lane = tl.arange(0, 32)
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    chunk_index = b * tl.num_programs(0) + chunk
    t = chunk * (K * LANES) + lane % LANES * K
    first_row = tl.program_id(1) * (R * (32 // LANES)) + lane // LANES
    dt = ()
    x = ()
    y = ()
    delta_before = ()
    for i in tl.static_range(R):
        row = first_row + i * (32 // LANES)
        step, delta_sum = _delta(delta, bias, b, row, s_db, s_dd, s_dt, t, row < d, LV, K, V, MASK, BIAS, SOFTPLUS)
        u_here = _load(u, b, row, s_ub, s_ud, s_ut, t, row < d, LV, K, V, MASK)
        skip = tl.zeros([32], tl.float32)
        if SKIP:
            skip = tl.load(D + row, mask=row < d, other=0.0).to(tl.float32)
        for j in tl.static_range(K):
            x = x + (u_here[j] * step[j],)
            y = y + (u_here[j] * skip,)
        dt = dt + step
        delta_before = delta_before + (_shift_lanes(delta_sum, lane, 1, LANES, False),)
    for k in tl.range(N):
        Bk = _load(B, b, lane * 0 + k, s_bb, s_bn, s_bt, t, None, LV, K, V, MASK)
        Ck = _load(C, b, lane * 0 + k, s_cb, s_cn, s_ct, t, None, LV, K, V, MASK)
        y_new = ()
        for i in tl.static_range(R):
            row = first_row + i * (32 // LANES)
            A2 = tl.load(A + row * N + k, mask=row < d, other=0.0) * LOG2E
            start = tl.zeros([32], tl.float32)
            if STARTS:
                start = tl.load(starts + chunk_index * N * d + (k * d + row), mask=row < d, other=0.0)
            a = ()
            bx = ()
            h = tl.zeros([32], tl.float32)
            for j in tl.static_range(K):
                a = a + (tl.exp2(A2 * dt[i * K + j]),)
                bx = bx + (x[i * K + j] * Bk[j],)
                h = a[j] * h + bx[j]
            h = _lane_scan(h, tl.exp2(A2 * delta_before[i]), start, lane, LANES, False)
            for j in tl.static_range(K):
                h = a[j] * h + bx[j]
                y_new = y_new + (y[i * K + j] + Ck[j] * h,)
        y = y_new
    for i in tl.static_range(R):
        row = first_row + i * (32 // LANES)
        out = ()
        if GATE:
            gate = _load(z, b, row, s_zb, s_zd, s_zt, t, row < d, LV, K, V, MASK)
        for j in tl.static_range(K):
            out = out + (y[i * K + j] * gate[j] * _sigmoid(gate[j]) if GATE else y[i * K + j],)
        _store(y_ptr + b * d * (LV * V), row, out, t, row < d, LV, K, V, MASK)
