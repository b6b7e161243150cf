# ruff: noqa: RUF005 (Triton has no starred expressions)
"""Triton kernels of the selective scan's backward pass; names, layout and arguments as in `scan_kernels`."""

from u2mamba.fast.scan_kernels import (
    LN2,
    LOG2E,
    _delta,
    _lane_scan,
    _load,
    _row_sum,
    _shift_lanes,
    _sigmoid,
    _store,
    _zeros,
    constexpr,
    jit,
    tl,
)  # fmt: skip


@jit
def _transpose_reduce(x, lane, K: constexpr, LANES: constexpr):
    """Sums over the rows of a warp of K numbers per thread; each thread keeps K * LANES / 32 of the sums. Halving the
    numbers with each exchange takes 3 instructions per number, separate sums 4 or more."""
    for s in tl.static_range(5):
        if (32 // LANES) >> (s + 1) > 0:
            upper = (lane & (16 >> s)) != 0
            half = ()
            for j in tl.static_range(K >> (s + 1)):
                give = tl.where(upper, x[j], x[j + (K >> (s + 1))])
                keep = tl.where(upper, x[j + (K >> (s + 1))], x[j])
                half = half + (keep + tl.gather(give, lane ^ (16 >> s), 0),)
            x = half
    return x


@jit
def _accumulate_dBC(part, out, k, x, t, group, groups, LV, K: constexpr, V: constexpr, SPLIT: constexpr):
    """Adds x to `part`, the sum of the groups of rows before; the last group writes to `out` unless SPLIT. No barrier
    is needed: a thread reads only what it wrote."""
    good = t >= 0
    old = _load(part, 0, k, 0, LV, 1, t, good & (group > 0), LV, K, V, True)
    total = ()
    for j in tl.static_range(K):
        total = total + (old[j] + x[j],)
    if SPLIT:
        _store(part, k, total, t, good, LV, K, V, True)
    else:
        _store(part, k, total, t, good & (group < groups - 1), LV, K, V, True)
        _store(out, k, total, t, good & (group == groups - 1), LV, K, V, True)


@jit
def _scan_backward(
    dy, u, delta, A, B, C, D, z, bias, starts, sums, du, ddelta, dz, part, dBC,
    s_yb, s_yd, s_yt, s_ub, s_ud, s_ut, s_db, s_dd, s_dt, s_bb, s_bn, s_bt, s_cb, s_cn, s_ct, s_zb, s_zd, s_zt,
    d, N, LV, groups,
    K: constexpr, LANES: constexpr, R: constexpr, V: constexpr, MASK: constexpr, BIAS: constexpr, SOFTPLUS: constexpr,
    GATE: constexpr, SKIP: constexpr, STARTS: constexpr, SPLIT: constexpr,
):  # fmt: skip
    """All gradients of one chunk and `groups` blocks of R * 32 / LANES rows.

    sums (b, chunks, n + 2, d): its first n rows hold e at the chunk's end and get the chunk's part of dA; then come
    those of dD and of the bias. part (splits, 2, b, n, L): dB and dC of this program's rows; dBC (2, b, n, L): where
    they end up if all rows are this program's (no SPLIT).
    """
    SHARE: constexpr = K * LANES // 32  # steps of which a thread keeps dB and dC
    SV: constexpr = V if SHARE % V == 0 else (2 if SHARE % 2 == 0 and V % 2 == 0 else 1)
    lane = tl.arange(0, 32)
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    chunk_index = b * tl.num_programs(0) + chunk
    t = chunk * (K * LANES) + lane % LANES * K
    out = b * d * (LV * V)
    at_b = b * N * (LV * V)
    at_c = at_b + tl.num_programs(2).to(tl.int64) * N * (LV * V)
    if SPLIT:
        part += tl.num_programs(2).to(tl.int64) * 2 * N * (LV * V) * tl.program_id(1)
    for group in tl.range(groups):
        first_row = (tl.program_id(1) * groups + group) * (R * (32 // LANES)) + lane // LANES
        dt = ()
        x = ()
        g = ()
        delta_before = ()
        delta_after = ()
        for i in tl.static_range(R):
            row = first_row + i * (32 // LANES)
            step, delta_sum = _delta(delta, bias, b, row, s_db, s_dd, s_dt, t, row < d, LV, K, V, MASK, BIAS, SOFTPLUS)
            u_here = _load(u, b, row, s_ub, s_ud, s_ut, t, row < d, LV, K, V, MASK)
            dy_here = _load(dy, b, row, s_yb, s_yd, s_yt, t, row < d, LV, K, V, MASK)
            if GATE:
                gate = _load(z, b, row, s_zb, s_zd, s_zt, t, row < d, LV, K, V, MASK)
            for j in tl.static_range(K):
                x = x + (u_here[j] * step[j],)
                g = g + (dy_here[j] * gate[j] * _sigmoid(gate[j]) if GATE else dy_here[j],)
            dt = dt + step
            delta_before = delta_before + (_shift_lanes(delta_sum, lane, 1, LANES, False),)
            delta_after = delta_after + (_shift_lanes(delta_sum, lane, 1, LANES, True),)
        y = _zeros(R * K)
        dx = _zeros(R * K)
        ddt = _zeros(R * K)
        for k in tl.range(N):
            Bk = _load(B, b, lane * 0 + k, s_bb, s_bn, s_bt, t, None, LV, K, V, MASK)
            Ck = _load(C, b, lane * 0 + k, s_cb, s_cn, s_ct, t, None, LV, K, V, MASK)
            dB = _zeros(K)
            dC = _zeros(K)
            y_new = ()
            dx_new = ()
            ddt_new = ()
            for i in tl.static_range(R):
                row = first_row + i * (32 // LANES)
                A2 = tl.load(A + row * N + k, mask=row < d, other=0.0) * LOG2E
                at_sums = sums + chunk_index * (N + 2) * d + (k * d + row)
                start = tl.zeros([32], tl.float32)
                end = tl.zeros([32], tl.float32)
                if STARTS:
                    start = tl.load(starts + chunk_index * N * d + (k * d + row), mask=row < d, other=0.0)
                    end = tl.load(at_sums, mask=row < d, other=0.0)
                a = ()
                bx = ()
                h = tl.zeros([32], tl.float32)
                e = tl.zeros([32], tl.float32)
                for j in tl.static_range(K):
                    a = a + (tl.exp2(A2 * dt[i * K + j]),)
                    bx = bx + (x[i * K + j] * Bk[j],)
                    h = a[j] * h + bx[j]
                for j in tl.static_range(K - 1, -1, -1):
                    e = a[j] * (Ck[j] * g[i * K + j] + e)
                h = _lane_scan(h, tl.exp2(A2 * delta_before[i]), start, lane, LANES, False)
                e = _lane_scan(e, tl.exp2(A2 * delta_after[i]), end, lane, LANES, True)
                old = ()  # a_t h_{t-1}
                dC_new = ()
                for j in tl.static_range(K):
                    old = old + (a[j] * h,)
                    h = old[j] + bx[j]
                    y_new = y_new + (y[i * K + j] + Ck[j] * h if GATE else y[i * K + j],)
                    dC_new = dC_new + (dC[j] + g[i * K + j] * h,)
                dA = tl.zeros([32], tl.float32)
                dB_new = ()
                dx_row = ()
                ddt_row = ()
                for j in tl.static_range(K - 1, -1, -1):
                    dh = Ck[j] * g[i * K + j] + e
                    e = a[j] * dh
                    q = dh * old[j]
                    dA += q * dt[i * K + j]
                    ddt_row = (ddt[i * K + j] + q * A2,) + ddt_row
                    dx_row = (dx[i * K + j] + dh * Bk[j],) + dx_row
                    dB_new = (dB[j] + dh * x[i * K + j],) + dB_new
                dB = dB_new
                dC = dC_new
                dx_new = dx_new + dx_row
                ddt_new = ddt_new + ddt_row
                tl.store(at_sums, _row_sum(dA, lane, LANES), mask=(row < d) & (lane % LANES == 0))
            y = y_new
            dx = dx_new
            ddt = ddt_new
            dB = _transpose_reduce(dB, lane, K, LANES)
            dC = _transpose_reduce(dC, lane, K, LANES)
            share = t + lane // LANES * SHARE
            at_k = lane * 0 + k
            _accumulate_dBC(part + at_b, dBC + at_b, at_k, dB, share, group, groups, LV * V // SV, SHARE, SV, SPLIT)
            _accumulate_dBC(part + at_c, dBC + at_c, at_k, dC, share, group, groups, LV * V // SV, SHARE, SV, SPLIT)
        for i in tl.static_range(R):
            row = first_row + i * (32 // LANES)
            ok = row < d
            u_here = _load(u, b, row, s_ub, s_ud, s_ut, t, ok, LV, K, V, MASK)
            skip = tl.zeros([32], tl.float32)
            if SKIP:
                skip = tl.load(D + row, mask=ok, other=0.0).to(tl.float32)
            if GATE:
                gate = _load(z, b, row, s_zb, s_zd, s_zt, t, ok, LV, K, V, MASK)
                dy_here = _load(dy, b, row, s_yb, s_yd, s_yt, t, ok, LV, K, V, MASK)
                dz_row = ()
                for j in tl.static_range(K):
                    s = _sigmoid(gate[j])
                    slope = s * (1.0 + gate[j] * (1.0 - s))
                    dz_row = dz_row + (dy_here[j] * slope * (y[i * K + j] + skip * u_here[j]),)
                _store(dz + out, row, dz_row, t, ok, LV, K, V, MASK)
            shift = 0.0
            if BIAS:
                shift = tl.load(bias + row, mask=ok, other=0.0).to(tl.float32)
            if SOFTPLUS:
                raw = _load(delta, b, row, s_db, s_dd, s_dt, t, ok, LV, K, V, MASK)
            dD = tl.zeros([32], tl.float32)
            dbias = tl.zeros([32], tl.float32)
            du_row = ()
            ddt_row = ()
            for j in tl.static_range(K):
                du_row = du_row + (dx[i * K + j] * dt[i * K + j] + skip * g[i * K + j],)
                change = ddt[i * K + j] * LN2 + dx[i * K + j] * u_here[j]
                if SOFTPLUS:
                    change *= _sigmoid(raw[j] + shift)
                if MASK:
                    change = tl.where(t + j < LV * V, change, 0.0)
                ddt_row = ddt_row + (change,)
                dD += g[i * K + j] * u_here[j]
                dbias += change
            _store(du + out, row, du_row, t, ok, LV, K, V, MASK)
            _store(ddelta + out, row, ddt_row, t, ok, LV, K, V, MASK)
            own = ok & (lane % LANES == 0)
            at_sums = sums + chunk_index * (N + 2) * d + (N * d + row)
            if SKIP:
                tl.store(at_sums, _row_sum(dD, lane, LANES), mask=own)
            if BIAS:
                tl.store(at_sums + d, _row_sum(dbias, lane, LANES), mask=own)


@jit
def _add_splits(part, out, size, splits, ROWS: constexpr, BLOCK: constexpr):
    """out = sum of the `splits` rows of part (splits, size), of which ROWS are loaded at once."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, splits, ROWS):
        ok = (first + row < splits)[:, None] & (at < size)[None, :]
        total += tl.load(part + (first + row).to(tl.int64)[:, None] * size + at[None, :], mask=ok, other=0.0)
    tl.store(out + at, tl.sum(total, 0), mask=at < size)
