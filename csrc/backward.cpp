// The backward of the 2D selective scan, for the one instruction set that this file is compiled for.
//
// With g_t the gradient of the state h_t: g_t = C_t dy_t + exp(δ_{t+1} A) ⊙ g_{t+1}. Each route is walked from
// its end in segments of `state_stride` positions. Each segment starts from a saved state; its states are
// recomputed and never leave the cache.
//
// Sums over channels (of delta's factors, B and C) are made within a block, written, and summed over blocks in
// the end; sums over positions (of the parameters) within a group of images, then over groups.
#include "common.h"

namespace VMAMBA_TARGET {
namespace {

constexpr int64_t most_groups = 16;   // of images: bounds the memory of the partial sums, one for each group
constexpr int64_t enough_tasks = 64;  // with more tasks, groups would only add work to the final sums
constexpr int64_t rows_of_task = 256;  // of the sums over blocks
constexpr int plain = 16;             // positions whose share of A's gradient is summed plainly; then Kahan's sum

// Loops copy the members that they read to locals: after a vector store the compiler must assume that any
// member changed, and reloads it.
template <class F> struct Backward {
  const vmamba_scan &s;
  const vmamba_gradients &g;
  const int64_t length, span, sums;  // sums: r + 2n values summed over channels, for each position and route
  const int64_t stretch;             // stride from a vector of channels to the next, at one position of a segment
  const int64_t rest_A, rest_bias, rest_W;  // offset from a sum over positions to its Kahan compensation
  F *const by_block, *const by_group;
  Parameters<F> p;
  std::unique_ptr<F[]> delta_copies, copies, B, C;     // [span] rows, [span] rows, [span][n], [span][n]
  std::unique_ptr<F[]> z, x, dy, dz, dx;               // [vectors][span] vectors
  std::unique_ptr<F[]> carry;                          // [n] rows: the gradient of the state ahead
  std::unique_ptr<F[]> sum_A, sum_bias, sum_W, sum_D;  // [k][n], [k], [k][r] and one row, twice
  std::unique_ptr<F[]> lane_sums;                      // twice [span][n] vectors, to be summed over lanes
  std::unique_ptr<F[]> vectors;                        // five times [span] vectors and one
  std::unique_ptr<const F *[]> delta_row, row_of;
  std::unique_ptr<F *[]> dx_row, out_row;
  std::unique_ptr<const char *[]> next_rows;  // three times [span]: of x, dy and dx, of the segment after this
  F *d, *slope, *decay, *h, *d_delta;

  Backward(const vmamba_scan &s, const vmamba_gradients &g, F *by_block, F *by_group)
      : s(s),
        g(g),
        length(s.height * s.width),
        span(std::min(s.state_stride, length)),
        sums(s.rank + 2 * s.n_state),
        stretch((span + lanes<F> - 1) / lanes<F> * lanes<F> * lanes<F>),  // whole vectors of positions
        rest_A(s.n_routes * s.n_state * widest),
        rest_bias(s.n_routes * widest),
        rest_W(s.n_routes * s.rank * widest),
        by_block(by_block),
        by_group(by_group),
        p(s),
        delta_copies(allocate<F>(span * (s.rank ? s.rank : widest))),
        copies(allocate<F>(span * widest)),
        B(allocate<F>(span * s.n_state)),
        C(allocate<F>(span * s.n_state)),
        z(allocate<F>(stretch * (widest / lanes<F>))),
        x(allocate<F>(stretch * (widest / lanes<F>))),
        dy(allocate<F>(stretch * (widest / lanes<F>))),
        dz(allocate<F>(stretch * (widest / lanes<F>))),
        dx(allocate<F>(stretch * (widest / lanes<F>))),
        carry(allocate<F>(s.n_state * widest)),
        sum_A(allocate<F>(2 * rest_A)),
        sum_bias(allocate<F>(2 * rest_bias)),
        sum_W(allocate<F>(2 * rest_W)),
        sum_D(allocate<F>(2 * widest)),
        lane_sums(allocate<F>(2 * stretch * s.n_state)),
        vectors(allocate<F>(5 * (stretch + lanes<F>))),
        delta_row(new const F *[size_t(span)]),
        row_of(new const F *[size_t(span + ahead)]),
        dx_row(new F *[size_t(span + ahead)]),
        out_row(new F *[size_t(span)]),
        next_rows(new const char *[size_t(3 * span + 3 * pack<F>)]()) {
    F **const buffers[] = {&d, &slope, &decay, &h, &d_delta};
    for (int i = 0; i < 5; ++i) *buffers[i] = vectors.get() + i * (stretch + lanes<F>);
  }

  // A group of images, b0 to b1.
  void images(int64_t b0, int64_t b1, int64_t group, int64_t block, int64_t first, int64_t count) {
    p.load_block(first, count);
    std::fill_n(sum_A.get(), 2 * rest_A, F(0));
    std::fill_n(sum_bias.get(), 2 * rest_bias, F(0));
    std::fill_n(sum_W.get(), 2 * rest_W, F(0));
    std::fill_n(sum_D.get(), 2 * widest, F(0));
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t k = 0; k < s.n_routes; ++k) route(b, k, block);

    F *to = by_group + group * per_group(s);
    const auto keep_sums = [&](const F *from, int64_t n) {
      for (int64_t i = 0; i < n; ++i, to += s.channels) std::copy_n(from + i * p.pitch, p.count, to + first);
    };
    keep_sums(sum_A.get(), s.n_routes * s.n_state);
    keep_sums(sum_bias.get(), s.n_routes);
    keep_sums(sum_W.get(), s.n_routes * s.rank);
    keep_sums(sum_D.get(), 1);
  }

  // How many values a group's sums have: rows of d channels for A, bias, weight and D.
  static int64_t per_group(const vmamba_scan &s) {
    return (s.n_routes * (s.n_state + 1 + s.rank) + 1) * s.channels;
  }

  void route(int64_t b, int64_t k, int64_t block) {
    const int64_t column = (b * s.n_routes + k) * s.channels + p.first;  // of (b, k, d)
    std::fill_n(carry.get(), s.n_state * p.pitch, F(0));
    if (g.last)
      p.turn_rows(static_cast<const F *>(g.last) + column * s.n_state, s.n_state, F(1), carry.get());
    const int64_t slots = (length + s.state_stride - 1) / s.state_stride;
    for (int64_t slot = slots - 1; slot >= 0; --slot) {
      const int64_t start = slot * s.state_stride;
      const F *saved = static_cast<const F *>(g.states) +
                       ((b * s.n_routes + k) * slots + slot) * s.n_state * s.channels + p.first;
      if (slot) note_next_rows(b, k, start - s.state_stride, int(s.state_stride));
      for (int64_t i = 0; slot && i < s.n_state * s.channels; i += s.channels)
        for (int64_t c = 0; c < p.count; c += lanes<F>) __builtin_prefetch(saved - s.n_state * s.channels + i + c);
      segment(b, k, block, start, int(std::min(s.state_stride, length - start)), saved);
    }
    if (g.initial)
      for (int64_t n = 0; n < s.n_state; ++n)
        for (int64_t i = 0; i < p.count; ++i)
          static_cast<F *>(g.initial)[(column + i) * s.n_state + n] = carry[n * p.pitch + i];
  }

  // Stores pointers to the next segment's rows, to prefetch them: the hardware does not where they lie in
  // different rows of the image.
  void note_next_rows(int64_t b, int64_t k, int64_t start, int n) {
    const auto note = [&](const vmamba_image &image, int64_t size, const Run &run, const char **to) {
      const char *const from = static_cast<const char *>(image.data) +
                               (b * image.stride[0] + run.at(image) + p.first) * size;
      for (int i = 0; i < run.count; ++i) to[run.first + i] = from + i * run.step(image) * size;
    };
    const vmamba_image of_dx = {g.x, type_of<F>, {length * s.channels, s.width * s.channels, s.channels, 0}};
    each_run(s, k, start, n, [&](const Run &run) {
      note(s.x, size_of(s.x.type), run, &next_rows[0]);
      note(g.y, size_of(g.y.type), run, &next_rows[span]);
      note(of_dx, sizeof(F), run, &next_rows[2 * span]);
    });
  }

  // Prefetches the cache line that begins with vector j, of the t-th of these rows and the next pack<F> - 1.
  VMAMBA_INLINE void prefetch_next(int t, int64_t j) const {
    if (j % (64 / VMAMBA_VECTOR_BYTES)) return;
    for (int i = 0; i < 3; ++i)
      for (int l = 0; l < pack<F>; ++l)
        __builtin_prefetch(next_rows[i * span + t + l] + j * lanes<F> * int64_t(sizeof(F)), 0, 2);
  }

  // n positions of a route, from the `start`-th on; `saved`: the state before them, (n, d).
  void segment(int64_t b, int64_t k, int64_t block, int64_t start, int n, const F *saved) {
    load_rows(s.x, b, k, start, n, x.get());
    load_rows(g.y, b, k, start, n, dy.get());
    each_run(s, k, start, n, [&](const Run &run) {
      delta_rows(p, b, k, run, delta_copies.get(), delta_row.get());
      copy_rows(s.B, b * s.B.stride[0] + k * s.B.stride[3], run, s.n_state, B.get());
      copy_rows(s.C, b * s.C.stride[0] + k * s.C.stride[3], run, s.n_state, C.get());
      const int64_t position = b * length + run.flat(s.width), step = run.flat_step(s.width);
      for (int i = 0; i < run.count; ++i) {
        const int64_t at = position + i * step;
        dx_row[run.first + i] = static_cast<F *>(g.x) + at * s.channels + p.first;
        out_row[run.first + i] =
            by_block + ((block * s.batch * length + at) * s.n_routes + k) * sums;
      }
    });
    std::fill_n(&dx_row[n], ahead, dx_row[n - 1]);
    preactivation(p, k, delta_row.get(), n, z.get(), {lanes<F>, stretch});

    F *const dB = lane_sums.get(), *const dC = dB + stretch * s.n_state;
    std::fill_n(dB, n * s.n_state * lanes<F>, F(0));
    std::fill_n(dC, n * s.n_state * lanes<F>, F(0));
    for (int64_t j = 0; j < p.pitch / lanes<F>; ++j) {
      if (!s.softplus)
        adjoint<false, false>(k, j, n, saved, dB, dC);
      else if (p.usual)
        adjoint<true, true>(k, j, n, saved, dB, dC);
      else
        adjoint<true, false>(k, j, n, saved, dB, dC);
    }
    write_gradient_x(k, n);
    write_sums(dB, s.rank, n);
    write_sums(dC, s.rank + s.n_state, n);
    if (s.rank) {
      outer_product(n, &sum_W[k * s.rank * p.pitch]);
      int64_t r = 0;
      for (; r + 8 <= s.rank; r += 8) inner_product<8>(n, r, p.w(k));
      for (; r + 4 <= s.rank; r += 4) inner_product<4>(n, r, p.w(k));
      for (; r + 2 <= s.rank; r += 2) inner_product<2>(n, r, p.w(k));
      for (; r < s.rank; ++r) inner_product<1>(n, r, p.w(k));
    } else {
      for (int t = 0; t < n; ++t)
        for (int64_t i = 0; i < p.count; ++i)
          static_cast<F *>(g.delta)[((dx_row[t] - static_cast<F *>(g.x) - p.first) * s.n_routes +
                                     k * s.channels) + p.first + i] =
              dz[i / lanes<F> * stretch + t * lanes<F> + i % lanes<F>];
    }
  }

  // The block's channels of n positions, vector by vector.
  void load_rows(const vmamba_image &image, int64_t b, int64_t k, int64_t start, int n, F *to) {
    each_run(s, k, start, n, [&](const Run &run) {
      rows_of(image, b * image.stride[0] + p.first, run, p.count, p.pitch, copies.get(), row_of.get());
    });
    std::fill_n(&row_of[n], ahead, row_of[n - 1]);
    const int64_t width = p.pitch, of_vector = stretch;
    for (int t = 0; t < n; ++t, to += lanes<F>) {
      const F *const from = row_of[t], *const later = row_of[t + ahead];
      for (int64_t i = 0; i < width; i += line<F>) __builtin_prefetch(later + i);
      F *of_t = to;
      for (int64_t i = 0; i < width; i += lanes<F>, of_t += of_vector) store(of_t, load(from + i));
    }
  }

  // Vector j of the block's channels: dz and dx, and dB and dC as n·n_state vectors summed over j.
  template <bool activated, bool usual>
  void adjoint(int64_t k, int64_t j, int n, const F *saved, F *dB, F *dC) {
    constexpr int L = lanes<F>;
    const F *const x_j = &x[j * stretch], *const dy_j = &dy[j * stretch];
    steps<activated, usual>(j, n);
    for (int64_t i = 0; i < s.n_state; ++i) {
      const Vector<F> before = load_states(saved + i * s.channels, j * L);
      states<usual>(k, i, j, n, x_j, before);
      if (s.n_state == 1)
        walk_back<activated, true>(k, i, j, n, x_j, dy_j, dB, dC);
      else
        walk_back<activated, false>(k, i, j, n, x_j, dy_j, dB, dC);
    }
    if (s.n_state > 1) {
      Vector<F> sum = {};
      for (int t = 0; t < n; ++t) {
        Vector<F> gradient = load(d_delta + t * L);
        if constexpr (activated) gradient *= load(slope + t * L);
        store(&dz[j * stretch + t * L], gradient);
        sum += gradient;
      }
      add(&sum_bias[k * p.pitch + j * L], rest_bias, sum);
    }
    if (k == 0) {
      Vector<F> sum = {};
      for (int t = 0; t < n; ++t) sum += load(dy_j + t * L) * load(x_j + t * L);
      add(&sum_D[j * L], widest, sum);
    }
  }

  // The segment's step sizes (softplus) and their derivatives.
  template <bool activated, bool usual> VMAMBA_NOINLINE void steps(int64_t j, int n) const {
    constexpr int L = lanes<F>;
    const F *const z_j = &z[j * stretch];
    F *const to_step = d, *const to_slope = slope;
    for (int t = 0; t < n; t += pack<F>) {
      prefetch_next(t, j);
      const Pack<F, pack<F>> in = row<F, pack<F>>(z_j + t * L);
      if constexpr (activated) {
        const Softplus<F, pack<F>> activated_step = softplus<F, usual, true>(in);
        keep(to_step + t * L, activated_step.value);
        keep(to_slope + t * L, activated_step.slope);
      } else {
        keep(to_step + t * L, in);
      }
    }
  }

  // Recomputes the segment's decays and states: h[0] before it, h[t + 1] after position t.
  template <bool usual>
  VMAMBA_NOINLINE void states(int64_t k, int64_t i, int64_t j, int n, const F *x_j, Vector<F> state) {
    constexpr int L = lanes<F>;
    const Vector<F> a = load(p.a_log2(k) + i * p.pitch + j * L);
    const F *const step_of = d, *const B_of = &B[i];
    F *const to_decay = decay, *const to_h = h;
    const int64_t n_state = s.n_state;
    store(to_h, state);
    for (int t = 0; t < n; t += pack<F>) {
      using All = Pack<F, pack<F>>;
      const All step = row<F, pack<F>>(step_of + t * L);
      const All factor = exp2<true, usual>(rounded(step * All::of([&](int) { return a; })));
      keep(to_decay + t * L, factor);
      const int last = std::min(pack<F>, n - t);
      for (int l = 0; l < last; ++l) {
        state = fma<F>(factor.v[l], state, step.v[l] * load(x_j + (t + l) * L) * B_of[(t + l) * n_state]);
        store(to_h + (t + l + 1) * L, state);
      }
    }
  }

  // The contributions of state i to the gradients; `only`: n_state is 1, so they are stored instead of added.
  template <bool activated, bool only>
  VMAMBA_NOINLINE void walk_back(int64_t k, int64_t i, int64_t j, int n, const F *x_j, const F *dy_j, F *dB,
                                 F *dC) {
    constexpr int L = lanes<F>;
    const int64_t n_state = only ? 1 : s.n_state;
    const Vector<F> a = load(p.a(k) + i * p.pitch + j * L);
    const F *const step_of = d, *const slope_of = slope, *const decay_of = decay, *const h_of = h;
    const F *const B_of = &B[i], *const C_of = &C[i];
    F *const dz_j = &dz[j * stretch], *const dx_j = &dx[j * stretch], *const d_delta_of = d_delta;
    F *const carried = &carry[i * p.pitch + j * L];
    dB += i * L, dC += i * L;
    // The critical path from one position to the next is a single instruction.
    Vector<F> gradient = load(carried), decay_ahead = splat<F>(1), state = load(h_of + n * L);
    for (int t = n - 1; t >= 0;) {
      const int stop = std::max(t - plain, -1);
      Vector<F> sum_decay = {}, sum = {};
      for (; t > stop; --t) {
        const Vector<F> out = load(dy_j + t * L), in = load(x_j + t * L), step = load(step_of + t * L);
        gradient = fma<F>(gradient, decay_ahead, out * C_of[t * n_state]);
        F *const to_B = dB + t * n_state * L, *const to_C = dC + t * n_state * L;
        store(to_B, load(to_B) + gradient * (step * in));
        store(to_C, load(to_C) + out * state);
        decay_ahead = load(decay_of + t * L);
        state = load(h_of + t * L);
        const Vector<F> exponent = gradient * decay_ahead * state, input = gradient * B_of[t * n_state];
        sum_decay += exponent * step;
        Vector<F> to_delta = exponent * a + input * in, to_x = input * step;
        if constexpr (only) {
          if constexpr (activated) to_delta *= load(slope_of + t * L);
          store(dz_j + t * L, to_delta);
          sum += to_delta;
        } else {
          if (i) to_delta += load(d_delta_of + t * L), to_x += load(dx_j + t * L);
          store(d_delta_of + t * L, to_delta);
        }
        store(dx_j + t * L, to_x);
      }
      add(&sum_A[(k * n_state + i) * p.pitch + j * L], rest_A, sum_decay);
      if constexpr (only) add(&sum_bias[k * p.pitch + j * L], rest_bias, sum);
    }
    store(carried, gradient * decay_ahead);
  }

  // Kahan's sum, with its compensation at to + rest: a long image has very many segments.
  VMAMBA_INLINE static void add(F *to, int64_t rest, Vector<F> v) {
    const Vector<F> sum = load(to), corrected = v - load(to + rest), next = sum + corrected;
    store(to + rest, (next - sum) - corrected);
    store(to, next);
  }

  // A saved state has no padding: do not read beyond the block's last channel.
  VMAMBA_INLINE Vector<F> load_states(const F *from, int64_t j) const {
    if (j + lanes<F> <= p.count) return load(from + j);
    F padded[lanes<F>] = {};
    std::copy(from + j, from + p.count, padded);
    return load(padded);
  }

  void write_gradient_x(int64_t k, int n) {
    const int64_t count = p.count, whole = count / lanes<F> * lanes<F>, of_vector = stretch;
    const F *from = dx.get(), *from_dy = dy.get();
    for (int t = 0; t < n; ++t, from += lanes<F>, from_dy += lanes<F>) {
      F *const to = dx_row[t];
      const F *const later = dx_row[t + ahead];
      for (int64_t i = 0; i < whole; i += line<F>) __builtin_prefetch(later + i, 1);
      int64_t i = 0, at = 0;
      for (; i < whole; i += lanes<F>, at += of_vector)
        store(to + i, load(from + at) + (k ? load(to + i) : load(p.skip + i) * load(from_dy + at)));
      for (int l = 0; i < count; ++i, ++l) to[i] = from[at + l] + (k ? to[i] : p.skip[i] * from_dy[at + l]);
    }
  }

  // Sums n·n_state vectors over their lanes, and writes them to the rows of sums from value `place` on.
  void write_sums(F *from, int64_t place, int n) {
    const int64_t count = n * s.n_state;
    for (int64_t i = 0; i < count; i += lanes<F>) {
      Vector<F> v[lanes<F>];
      for (int l = 0; l < lanes<F>; ++l)
        v[l] = i + l < count ? load(from + (i + l) * lanes<F>) : Vector<F>{};
      store(from + i, sum_lanes<F>(v));  // overwrites vectors that are summed already
    }
    const int64_t n_state = s.n_state;  // a loop, as it is mostly 1, for which memmove would be slow
    for (int t = 0; t < n; ++t, from += n_state)
      for (int64_t i = 0; i < n_state; ++i) out_row[t][place + i] = from[i];
  }

  // sum[r] += Σ_t delta[t][r] dz[t]
  void outer_product(int n, F *sum) const {
    constexpr int wide = VMAMBA_VECTOR_BYTES == 64 ? 4 : 2;
    int64_t j = 0;
    for (; j + wide <= p.pitch / lanes<F>; j += wide) outer_columns<wide>(n, j, sum);
    for (; j < p.pitch / lanes<F>; ++j) outer_columns<1>(n, j, sum);
  }

  template <int J> void outer_columns(int n, int64_t j, F *sum) const {
    int64_t r = 0;
    for (; r + 6 <= s.rank; r += 6) outer_tile<6, J>(n, j, r, sum);
    for (; r + 2 <= s.rank; r += 2) outer_tile<2, J>(n, j, r, sum);
    for (; r < s.rank; ++r) outer_tile<1, J>(n, j, r, sum);
  }

  template <int R, int J> VMAMBA_INLINE void outer_tile(int n, int64_t j, int64_t r, F *sum) const {
    Vector<F> sums_of[R][J] = {};
    for (int t = 0; t < n; ++t) {
      const F *in = delta_row[t] + r, *of_t = &dz[j * stretch + t * lanes<F>];
      Vector<F> v[J];
      for (int a = 0; a < J; ++a) v[a] = load(of_t + a * stretch);
      for (int i = 0; i < R; ++i)
        for (int a = 0; a < J; ++a) sums_of[i][a] += v[a] * in[i];
    }
    for (int i = 0; i < R; ++i)
      for (int a = 0; a < J; ++a) add(sum + (r + i) * p.pitch + (j + a) * lanes<F>, rest_W, sums_of[i][a]);
  }

  // The gradients of values r to r + R of low-rank delta: Σ_d dz[t][d] weight[r][d], for as many positions at
  // a time as their sums fill one vector. Rows beyond the n-th are undefined.
  template <int R> void inner_product(int n, int64_t r, const F *weight) const {
    constexpr int T = lanes<F> / R;
    if constexpr (T > 0) {
      for (int t = 0; t < n; t += T) {
        Vector<F> products[T * R] = {};
        for (int64_t j = 0; j < p.pitch / lanes<F>; ++j) {
          Vector<F> w[R];
          for (int i = 0; i < R; ++i) w[i] = load(weight + (r + i) * p.pitch + j * lanes<F>);
          for (int a = 0; a < T; ++a) {
            const Vector<F> v = load(&dz[j * stretch + (t + a) * lanes<F>]);
            for (int i = 0; i < R; ++i) products[a * R + i] += v * w[i];
          }
        }
        F totals[lanes<F>];
        store(totals, sum_lanes<F>(products) * (p.usual ? Simd<F>::ln2 : F(1)));
        const int last = std::min(T, n - t);
        for (int a = 0; a < last; ++a)
          for (int i = 0; i < R; ++i) out_row[t + a][r + i] = totals[a * R + i];
      }
    } else {
      inner_product<R / 2>(n, r, weight), inner_product<R / 2>(n, r + R / 2, weight);
    }
  }
};

// Sums the partial results over blocks and over groups into the gradients.
template <class F>
void finish(const vmamba_scan &s, const vmamba_gradients &g, int64_t blocks, const F *by_block, int64_t groups,
            const F *by_group) {
  const int64_t rows = s.batch * s.height * s.width * s.n_routes, sums = s.rank + 2 * s.n_state;
  const int64_t pieces = (rows + rows_of_task - 1) / rows_of_task;
  deal(pieces, s.threads, [&](const auto &next) {
    const auto totals = allocate<F>(rows_of_task * sums);
    for (int64_t piece; (piece = next()) < pieces;) {
      const int64_t row = piece * rows_of_task, n = std::min(rows_of_task, rows - row);
      std::copy_n(by_block + row * sums, n * sums, totals.get());
      for (int64_t block = 1; block < blocks; ++block) {
        const F *const addend = by_block + (block * rows + row) * sums;
        for (int64_t i = 0; i < n * sums; ++i) totals[i] += addend[i];
      }
      const F *from = totals.get();
      const auto give = [&](void *to, int64_t count, int64_t at) {
        for (int64_t i = 0; i < count; ++i, ++from) static_cast<F *>(to)[at * count + i] = *from;
      };
      for (int64_t at = row; at < row + n; ++at)
        give(g.delta, s.rank, at), give(g.B, s.n_state, at), give(g.C, s.n_state, at);
    }
  });

  const int64_t each = Backward<F>::per_group(s), blocks_of_route = (s.channels + widest - 1) / widest;
  const int64_t tasks = s.n_routes * blocks_of_route;
  deal(tasks, s.threads, [&](const auto &next) {
    for (int64_t task; (task = next()) < tasks;) {
      const int64_t k = task / blocks_of_route, first = task % blocks_of_route * widest;
      const int64_t count = std::min<int64_t>(widest, s.channels - first);
      // Value i of the n of each channel of a route; it is in row `row` of each group's sums.
      const auto sum = [&](void *to, int64_t row, int64_t n, int64_t i) {
        F total[widest] = {};
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t c = 0; c < count; ++c) total[c] += by_group[group * each + row * s.channels + first + c];
        for (int64_t c = 0; c < count; ++c)
          static_cast<F *>(to)[(k * s.channels + first + c) * n + i] = total[c];
      };
      for (int64_t i = 0; i < s.n_state; ++i) sum(g.A, k * s.n_state + i, s.n_state, i);
      const int64_t after_A = s.n_routes * s.n_state, after_bias = after_A + s.n_routes;
      if (g.bias) sum(g.bias, after_A + k, 1, 0);
      for (int64_t i = 0; i < s.rank; ++i) sum(g.weight, after_bias + k * s.rank + i, s.rank, i);
      if (g.D) sum(g.D, after_bias + s.n_routes * s.rank, 1, 0);
    }
  });
}

template <class F> int run(const vmamba_scan &s, const vmamba_gradients &g) {
  const int64_t blocks = (s.channels + widest - 1) / widest;
  const int64_t most = std::clamp<int64_t>(enough_tasks / std::max<int64_t>(blocks, 1), 1, most_groups);
  const int64_t images = std::max<int64_t>((s.batch + most - 1) / most, 1);  // in a group
  const int64_t groups = (s.batch + images - 1) / images;
  const int64_t rows = s.batch * s.height * s.width * s.n_routes;
  std::unique_ptr<F[]> by_block, by_group;
  try {
    by_block = allocate<F>(blocks * rows * (s.rank + 2 * s.n_state));
    by_group = allocate<F>(groups * Backward<F>::per_group(s));
  } catch (const std::bad_alloc &) {
    return VMAMBA_OUT_OF_MEMORY;
  }
  const int status = each_block<Backward<F>>(
      s, widest, groups, [&] { return new Backward<F>(s, g, by_block.get(), by_group.get()); },
      [&](Backward<F> &worker, int64_t group, int64_t block, int64_t first, int64_t count) {
        worker.images(group * images, std::min((group + 1) * images, s.batch), group, block, first, count);
      });
  if (status == VMAMBA_OK) finish<F>(s, g, blocks, by_block.get(), groups, by_group.get());
  return status;
}

}  // namespace

int backward(const vmamba_scan &s, const vmamba_gradients &g) {
  return s.state_type == VMAMBA_FLOAT64 ? run<double>(s, g) : run<float>(s, g);
}

}  // namespace VMAMBA_TARGET
