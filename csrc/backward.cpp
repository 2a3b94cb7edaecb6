// The backward of the 2D selective scan, for the one instruction set that this file is compiled for.
//
// With g_t the gradient of the state h_t: g_t = C_t dy_t + exp(δ_{t+1} A) ⊙ g_{t+1}. Each route is walked from
// its end, from saved state to saved state; what lies between, at most `state_stride` positions, is computed
// again and never leaves the cache.
//
// Sums over channels (of delta's factors, B and C) are made within a block, written, and summed over blocks in
// the end; sums over positions (of the parameters) within a group of images, then over groups.
#include "common.h"

namespace VMAMBA_TARGET {
namespace {

constexpr int64_t most_groups = 16;  // of images: bounds what is kept for sums over them

template <class F> struct Backward {
  const vmamba_scan &s;
  const vmamba_gradients &g;
  const int64_t length, span, sums;  // sums: over channels, of a position and route, R + 2N
  const int64_t rest_A, rest_bias, rest_W;  // from a sum over positions to its compensation
  F *const by_block, *const by_group;
  Parameters<F> p;
  std::unique_ptr<F[]> delta_in, B, C;                 // [span][R], [span][N], [span][N]
  std::unique_ptr<F[]> z, x, dy, dz, dx;               // [span] rows
  std::unique_ptr<F[]> carry;                          // [N] rows: the gradient of the state ahead
  std::unique_ptr<F[]> sum_A, sum_bias, sum_W, sum_D;  // [K][N], [K], [K][R] and one row, twice
  std::unique_ptr<F[]> lane_sums;                      // [span][R or N] vectors, to be summed over lanes
  std::unique_ptr<F[]> vectors;                        // six times [span] vectors
  std::unique_ptr<const F *[]> delta_row;
  F *d, *slope, *u, *decay, *h, *d_delta;

  Backward(const vmamba_scan &s, const vmamba_gradients &g, F *by_block, F *by_group)
      : s(s),
        g(g),
        length(s.height * s.width),
        span(std::min(s.state_stride, length)),
        sums(s.rank + 2 * s.n_state),
        rest_A(s.n_routes * s.n_state * widest),
        rest_bias(s.n_routes * widest),
        rest_W(s.n_routes * s.rank * widest),
        by_block(by_block),
        by_group(by_group),
        p(s),
        delta_in(allocate<F>(span * s.rank)),
        B(allocate<F>(span * s.n_state)),
        C(allocate<F>(span * s.n_state)),
        z(allocate<F>(span * widest)),
        x(allocate<F>(span * widest)),
        dy(allocate<F>(span * widest)),
        dz(allocate<F>(span * widest)),
        dx(allocate<F>(span * widest)),
        carry(allocate<F>(s.n_state * widest)),
        sum_A(allocate<F>(2 * rest_A)),
        sum_bias(allocate<F>(2 * rest_bias)),
        sum_W(allocate<F>(2 * rest_W)),
        sum_D(allocate<F>(2 * widest)),
        lane_sums(allocate<F>(2 * (span * std::max(s.rank, s.n_state) + lanes<F>) * lanes<F>)),
        vectors(allocate<F>(6 * span * lanes<F>)),
        delta_row(new const F *[size_t(span)]) {
    F **const parts[] = {&d, &slope, &u, &decay, &h, &d_delta};
    for (int i = 0; i < 6; ++i) *parts[i] = vectors.get() + i * span * lanes<F>;
  }

  // A group of images, b0 to b1.
  void images(int64_t b0, int64_t b1, int64_t group, int64_t block, int64_t first, int64_t count) {
    p.take(first, count);
    std::fill_n(sum_A.get(), 2 * rest_A, F(0));
    std::fill_n(sum_bias.get(), 2 * rest_bias, F(0));
    std::fill_n(sum_W.get(), 2 * rest_W, F(0));
    std::fill_n(sum_D.get(), 2 * widest, F(0));
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t k = 0; k < s.n_routes; ++k) route(b, k, block);

    F *to = by_group + group * per_group(s);
    const auto keep = [&](const F *from, int64_t n) {
      for (int64_t i = 0; i < n; ++i, to += s.channels) std::copy_n(from + i * p.pitch, p.count, to + first);
    };
    keep(sum_A.get(), s.n_routes * s.n_state);
    keep(sum_bias.get(), s.n_routes);
    keep(sum_W.get(), s.n_routes * s.rank);
    keep(sum_D.get(), 1);
  }

  // The values of a group's sums: rows of D for A, bias, weight and D.
  static int64_t per_group(const vmamba_scan &s) {
    return (s.n_routes * (s.n_state + 1 + s.rank) + 1) * s.channels;
  }

  void route(int64_t b, int64_t k, int64_t block) {
    const int64_t column = (b * s.n_routes + k) * s.channels + p.first;  // of (B, K, D)
    for (int64_t n = 0; n < s.n_state; ++n)
      for (int64_t i = 0; i < p.pitch; ++i)
        carry[n * p.pitch + i] =
            g.last && i < p.count ? static_cast<const F *>(g.last)[(column + i) * s.n_state + n] : F(0);
    const int64_t slots = (length + s.state_stride - 1) / s.state_stride;
    for (int64_t slot = slots - 1; slot >= 0; --slot) {
      const int64_t start = slot * s.state_stride;
      const F *saved = static_cast<const F *>(g.states) +
                       ((b * s.n_routes + k) * slots + slot) * s.n_state * s.channels + p.first;
      segment(b, k, block, start, int(std::min(s.state_stride, length - start)), saved);
    }
    if (g.initial)
      for (int64_t n = 0; n < s.n_state; ++n)
        for (int64_t i = 0; i < p.count; ++i)
          static_cast<F *>(g.initial)[(column + i) * s.n_state + n] = carry[n * p.pitch + i];
  }

  // n positions of a route, from the `start`-th on; `saved`: the state before them, (N, D).
  void segment(int64_t b, int64_t k, int64_t block, int64_t start, int n, const F *saved) {
    Walk walk(s, s.routes[k], start);
    preactivation(p, b, k, walk, n, delta_row.get(), delta_in.get(), z.get());
    for (int t = 0; t < n; ++t, walk.step()) {
      read_padded(s.x, b * s.x.stride[0] + walk.at(s.x) + p.first, p, &x[t * p.pitch]);
      read_padded(g.y, b * g.y.stride[0] + walk.at(g.y) + p.first, p, &dy[t * p.pitch]);
      read_few(s.B, b * s.B.stride[0] + walk.at(s.B) + k * s.B.stride[3], s.n_state, &B[t * s.n_state]);
      read_few(s.C, b * s.C.stride[0] + walk.at(s.C) + k * s.C.stride[3], s.n_state, &C[t * s.n_state]);
    }
    const int64_t states = n * s.n_state;
    F *const dB = lane_sums.get();
    F *const dC = dB + (states + lanes<F> - 1) / lanes<F> * lanes<F> * lanes<F>;
    for (int64_t j = 0; j < p.pitch; j += lanes<F>) {
      if (s.softplus)
        p.scaled ? adjoint<true, true>(k, j, n, saved, dB, dC) : adjoint<true, false>(k, j, n, saved, dB, dC);
      else
        adjoint<false, false>(k, j, n, saved, dB, dC);
    }
    write_gradient_x(b, k, start, n);
    F *const out = by_block + (block * s.batch + b) * length * s.n_routes * sums;
    write_sums(dB, s.n_state, F(1), out + s.rank, k, start, n);
    write_sums(dC, s.n_state, F(1), out + s.rank + s.n_state, k, start, n);
    if (s.rank) {
      outer_product(n, &sum_W[k * s.rank * p.pitch]);
      inner_product(n, p.w(k), lane_sums.get());
      write_sums(lane_sums.get(), s.rank, p.scaled ? Simd<F>::ln2 : F(1), out, k, start, n);
    } else {
      Walk to(s, s.routes[k], start);
      for (int t = 0; t < n; ++t, to.step())
        std::copy_n(&dz[t * p.pitch], p.count,
                    static_cast<F *>(g.delta) + ((b * length + to.flat()) * s.n_routes + k) * s.channels + p.first);
    }
  }

  // The channels of one vector, from j on: dz and dx as rows, dB and dC as [n][N] vectors summed over j.
  template <bool activated, bool scaled>
  void adjoint(int64_t k, int64_t j, int n, const F *saved, F *dB, F *dC) {
    constexpr int L = lanes<F>;
    const int64_t states = s.n_state;
    for (int t = 0; t < n; ++t) {
      const Vector<F> in = load(&z[t * p.pitch + j]);
      if constexpr (activated) {
        const Softplus<F> found = softplus<F, scaled, true>(in);
        store(d + t * L, found.value);
        store(slope + t * L, found.slope);
        store(u + t * L, found.value * load(&x[t * p.pitch + j]));
      } else {
        store(d + t * L, in);
        store(u + t * L, in * load(&x[t * p.pitch + j]));
      }
    }
    for (int64_t i = 0; i < states; ++i) {
      const Vector<F> a = load(p.a(k) + i * p.pitch + j), a_log2 = load(p.a_log2(k) + i * p.pitch + j);
      const Vector<F> before = load_states(saved + i * s.channels, j);
      Vector<F> state = before;
      for (int t = 0; t < n; ++t) {
        const Vector<F> factor = exp2<F>(load(d + t * L) * a_log2);
        state = factor * state + load(u + t * L) * B[t * states + i];
        store(decay + t * L, factor);
        store(h + t * L, state);
      }
      Vector<F> ahead = load(&carry[i * p.pitch + j]), sum = {};
      for (int t = n - 1; t >= 0; --t) {
        const Vector<F> out = load(&dy[t * p.pitch + j]), gradient = ahead + out * C[t * states + i];
        F *const to_C = dC + (t * states + i) * L, *const to_B = dB + (t * states + i) * L;
        const Vector<F> for_C = out * load(h + t * L), for_B = gradient * load(u + t * L);
        store(to_C, j ? load(to_C) + for_C : for_C);
        store(to_B, j ? load(to_B) + for_B : for_B);
        ahead = gradient * load(decay + t * L);
        const Vector<F> exponent = ahead * (t ? load(h + (t - 1) * L) : before), step = load(d + t * L);
        sum += exponent * step;
        const Vector<F> input = gradient * B[t * states + i];
        const Vector<F> to_delta = exponent * a + input * load(&x[t * p.pitch + j]), to_x = input * step;
        F *const row = &dx[t * p.pitch + j];
        store(d_delta + t * L, i ? load(d_delta + t * L) + to_delta : to_delta);
        store(row, i ? load(row) + to_x : to_x);
      }
      store(&carry[i * p.pitch + j], ahead);
      add(&sum_A[(k * states + i) * p.pitch + j], rest_A, sum);
    }
    Vector<F> sum = {}, sum_skip = {};
    for (int t = 0; t < n; ++t) {
      Vector<F> gradient = load(d_delta + t * L);
      if constexpr (activated) gradient *= load(slope + t * L);
      store(&dz[t * p.pitch + j], gradient);
      sum += gradient;
      sum_skip += load(&dy[t * p.pitch + j]) * load(&x[t * p.pitch + j]);
    }
    add(&sum_bias[k * p.pitch + j], rest_bias, sum);
    if (k == 0) add(&sum_D[j], widest, sum_skip);
  }

  // Kahan's sum, whose compensation lies `rest` behind it: of a long image there are very many segments.
  VMAMBA_INLINE static void add(F *to, int64_t rest, Vector<F> v) {
    const Vector<F> sum = load(to), corrected = v - load(to + rest), next = sum + corrected;
    store(to + rest, (next - sum) - corrected);
    store(to, next);
  }

  // Saved states end with the block's last channel.
  VMAMBA_INLINE Vector<F> load_states(const F *from, int64_t j) const {
    if (j + lanes<F> <= p.count) return load(from + j);
    F padded[lanes<F>] = {};
    std::copy(from + j, from + p.count, padded);
    return load(padded);
  }

  void write_gradient_x(int64_t b, int64_t k, int64_t start, int n) {
    Walk walk(s, s.routes[k], start);
    for (int t = 0; t < n; ++t, walk.step()) {
      F *const to = static_cast<F *>(g.x) + (b * length + walk.flat()) * s.channels + p.first;
      const F *from = &dx[t * p.pitch], *out = &dy[t * p.pitch];
      if (k)
        for (int64_t i = 0; i < p.count; ++i) to[i] += from[i];
      else
        for (int64_t i = 0; i < p.count; ++i) to[i] = from[i] + p.skip[i] * out[i];
    }
  }

  // Vectors [n][m], summed over lanes and multiplied, to rows of `out` in image position.
  void write_sums(F *from, int64_t m, F factor, F *out, int64_t k, int64_t start, int n) {
    const int64_t count = n * m;
    for (int64_t i = 0; i < count; i += lanes<F>) {
      Vector<F> v[lanes<F>];
      for (int l = 0; l < lanes<F>; ++l)
        v[l] = i + l < count ? load(from + (i + l) * lanes<F>) : Vector<F>{};
      store(from + i, sum_lanes<F>(v) * factor);  // over vectors that are done with
    }
    Walk walk(s, s.routes[k], start);
    for (int t = 0; t < n; ++t, walk.step(), from += m)
      std::copy_n(from, m, out + (walk.flat() * s.n_routes + k) * sums);
  }

  // sum[r] += Σ_t delta[t][r] dz[t]
  void outer_product(int n, F *sum) const {
    constexpr int wide = VMAMBA_VECTOR_BYTES == 64 ? 4 : 2;
    int64_t j = 0;
    for (; j + wide * lanes<F> <= p.pitch; j += wide * lanes<F>) outer_columns<wide>(n, j, sum);
    for (; j < p.pitch; j += lanes<F>) outer_columns<1>(n, j, sum);
  }

  template <int J> void outer_columns(int n, int64_t j, F *sum) const {
    int64_t r = 0;
    for (; r + 6 <= s.rank; r += 6) outer_tile<6, J>(n, j, r, sum);
    for (; r + 2 <= s.rank; r += 2) outer_tile<2, J>(n, j, r, sum);
    for (; r < s.rank; ++r) outer_tile<1, J>(n, j, r, sum);
  }

  template <int R, int J> VMAMBA_INLINE void outer_tile(int n, int64_t j, int64_t r, F *sum) const {
    Vector<F> part[R][J] = {};
    for (int t = 0; t < n; ++t) {
      const F *in = delta_row[t] + r, *row = &dz[t * p.pitch + j];
      for (int a = 0; a < J; ++a) {
        const Vector<F> v = load(row + a * lanes<F>);
        for (int i = 0; i < R; ++i) part[i][a] += v * in[i];
      }
    }
    for (int i = 0; i < R; ++i)
      for (int a = 0; a < J; ++a) add(sum + (r + i) * p.pitch + j + a * lanes<F>, rest_W, part[i][a]);
  }

  // to[t][r] = Σ_d dz[t][d] weight[r][d], as vectors whose lanes are yet to be summed.
  void inner_product(int n, const F *weight, F *to) const {
    int t = 0;
    for (; t + 4 <= n; t += 4) inner_rows<4>(t, weight, to);
    for (; t < n; ++t) inner_rows<1>(t, weight, to);
  }

  template <int T> void inner_rows(int t, const F *weight, F *to) const {
    constexpr int wide = VMAMBA_VECTOR_BYTES == 64 ? 4 : 2;
    int64_t r = 0;
    for (; r + wide <= s.rank; r += wide) inner_tile<T, wide>(t, r, weight, to);
    for (; r < s.rank; ++r) inner_tile<T, 1>(t, r, weight, to);
  }

  template <int T, int R> VMAMBA_INLINE void inner_tile(int t, int64_t r, const F *weight, F *to) const {
    Vector<F> part[T][R] = {};
    for (int64_t j = 0; j < p.pitch; j += lanes<F>) {
      Vector<F> w[R];
      for (int i = 0; i < R; ++i) w[i] = load(weight + (r + i) * p.pitch + j);
      for (int a = 0; a < T; ++a) {
        const Vector<F> v = load(&dz[(t + a) * p.pitch + j]);
        for (int i = 0; i < R; ++i) part[a][i] += v * w[i];
      }
    }
    for (int a = 0; a < T; ++a)
      for (int i = 0; i < R; ++i) store(to + ((t + a) * s.rank + r + i) * lanes<F>, part[a][i]);
  }
};

// The sums over blocks and over groups.
template <class F>
void finish(const vmamba_scan &s, const vmamba_gradients &g, int64_t blocks, const F *by_block, int64_t groups,
            const F *by_group) {
  const int64_t rows = s.batch * s.height * s.width * s.n_routes, sums = s.rank + 2 * s.n_state;
  const auto of_row = [&](int64_t row) {
    const auto sum = [&](int64_t i) {
      F found = by_block[row * sums + i];
      for (int64_t block = 1; block < blocks; ++block) found += by_block[(block * rows + row) * sums + i];
      return found;
    };
    for (int64_t i = 0; i < s.rank; ++i) static_cast<F *>(g.delta)[row * s.rank + i] = sum(i);
    for (int64_t i = 0; i < s.n_state; ++i) {
      static_cast<F *>(g.B)[row * s.n_state + i] = sum(s.rank + i);
      static_cast<F *>(g.C)[row * s.n_state + i] = sum(s.rank + s.n_state + i);
    }
  };
  in_shares(rows, s.threads, [&](int64_t row, int64_t last) {
    for (; row < last; ++row) of_row(row);
  });

  const int64_t each = Backward<F>::per_group(s), columns = s.n_routes * s.channels;
  const auto of_column = [&](int64_t column) {
    const int64_t k = column / s.channels, d = column % s.channels;
    const auto sum = [&](int64_t row) {
      F found = 0;
      for (int64_t group = 0; group < groups; ++group) found += by_group[group * each + row * s.channels + d];
      return found;
    };
    int64_t row = k * s.n_state;
    for (int64_t i = 0; i < s.n_state; ++i) static_cast<F *>(g.A)[column * s.n_state + i] = sum(row + i);
    row = s.n_routes * s.n_state;
    if (g.bias) static_cast<F *>(g.bias)[column] = sum(row + k);
    row += s.n_routes + k * s.rank;
    for (int64_t i = 0; i < s.rank; ++i) static_cast<F *>(g.weight)[column * s.rank + i] = sum(row + i);
    row = s.n_routes * (s.n_state + 1 + s.rank);
    if (g.D) static_cast<F *>(g.D)[column] = sum(row);
  };
  in_shares(columns, s.threads, [&](int64_t column, int64_t last) {
    for (; column < last; ++column) of_column(column);
  });
}

template <class F> int run(const vmamba_scan &s, const vmamba_gradients &g) {
  const int64_t blocks = (s.channels + widest - 1) / widest, groups = std::min(s.batch, most_groups);
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
        worker.images(group * s.batch / groups, (group + 1) * s.batch / groups, group, block, first, count);
      });
  if (status == VMAMBA_OK) finish<F>(s, g, blocks, by_block.get(), groups, by_group.get());
  return status;
}

}  // namespace

int backward(const vmamba_scan &s, const vmamba_gradients &g) {
  return s.state_type == VMAMBA_FLOAT64 ? run<double>(s, g) : run<float>(s, g);
}

}  // namespace VMAMBA_TARGET
