// The forward of the 2D selective scan, for the one instruction set that this file is compiled for.
#include "common.h"

namespace VMAMBA_TARGET {
namespace {

template <class F> struct Forward {
  const vmamba_scan &s;
  F *const y, *const last, *const states;
  Parameters<F> p;
  std::unique_ptr<F[]> h, B, C, delta_in;  // [N] rows, [tile][N], [tile][N], [tile][R]
  alignas(64) F delta[tile * widest], x_copy[tile * widest], y_copy[tile * widest];
  const F *x_row[tile], *delta_row[tile];
  F *y_row[tile], *y_home[tile];

  Forward(const vmamba_scan &s, F *y, F *last, F *states)
      : s(s),
        y(y),
        last(last),
        states(states),
        p(s),
        h(allocate<F>(s.n_state * widest)),
        B(allocate<F>(tile * s.n_state)),
        C(allocate<F>(tile * s.n_state)),
        delta_in(allocate<F>(tile * s.rank)) {}

  void image(int64_t b, int64_t first, int64_t count) {
    p.take(first, count);
    for (int64_t k = 0; k < s.n_routes; ++k) route(b, k);
  }

  void route(int64_t b, int64_t k) {
    const int64_t length = s.height * s.width, slots = (length + s.state_stride - 1) / s.state_stride;
    const int64_t column = (b * s.n_routes + k) * s.channels + p.first;  // of (B, K, D)
    for (int64_t n = 0; n < s.n_state; ++n)
      for (int64_t d = 0; d < p.pitch; ++d)
        h[n * p.pitch + d] = s.initial && d < p.count
                                 ? static_cast<const F *>(s.initial)[(column + d) * s.n_state + n]
                                 : F(0);
    Walk walk(s, s.routes[k], 0);
    for (int64_t t = 0; t < length; t += tile) {
      if (t % s.state_stride == 0)
        for (int64_t n = 0; n < s.n_state; ++n)
          std::copy_n(&h[n * p.pitch], p.count,
                      states + (((b * s.n_routes + k) * slots + t / s.state_stride) * s.n_state + n) *
                                   s.channels + p.first);
      positions(b, k, walk, int(std::min<int64_t>(tile, length - t)));
    }
    for (int64_t n = 0; n < s.n_state; ++n)
      for (int64_t d = 0; d < p.count; ++d) last[(column + d) * s.n_state + n] = h[n * p.pitch + d];
  }

  // A tile of n positions; leaves `walk` behind it.
  void positions(int64_t b, int64_t k, Walk &walk, int n) {
    const Walk start = walk;
    const bool whole = p.pitch == p.count;
    for (int t = 0; t < n; ++t, walk.step()) {
      const int64_t x = b * s.x.stride[0] + walk.at(s.x) + p.first;
      if (whole && s.x.type == type_of<F>) {
        x_row[t] = static_cast<const F *>(s.x.data) + x;
      } else {
        F *to = x_copy + t * p.pitch;
        read_padded(s.x, x, p, to);
        x_row[t] = to;
      }
      y_row[t] = y_home[t] = y + (b * s.height * s.width + walk.flat()) * s.channels + p.first;
      // Rows of other image lines: what is formed of delta in the meantime hides the way from memory.
      for (int64_t d = 0; d < p.count; d += 64 / int64_t(sizeof(F))) {
        __builtin_prefetch(x_row[t] + d);
        __builtin_prefetch(y_home[t] + d, 1);
      }
      if (!whole) {
        y_row[t] = y_copy + t * p.pitch;
        if (k) std::copy_n(y_home[t], p.count, y_row[t]);
      }
      read_few(s.B, b * s.B.stride[0] + walk.at(s.B) + k * s.B.stride[3], s.n_state, &B[t * s.n_state]);
      read_few(s.C, b * s.C.stride[0] + walk.at(s.C) + k * s.C.stride[3], s.n_state, &C[t * s.n_state]);
    }
    preactivation(p, b, k, start, n, delta_row, delta_in.get(), delta);
    if (s.softplus)
      p.scaled ? recur<true, true>(k, n) : recur<true, false>(k, n);
    else
      recur<false, false>(k, n);
    if (!whole)
      for (int t = 0; t < n; ++t) std::copy_n(y_row[t], p.count, y_home[t]);
  }

  template <bool activated, bool scaled> void recur(int64_t k, int n) {
    if (s.n_state == 1)
      k ? recur_one<activated, scaled, false>(k, n) : recur_one<activated, scaled, true>(k, n);
    else
      recur_many<activated, scaled>(k, n);
  }

  template <bool activated, bool scaled> VMAMBA_INLINE static Vector<F> step_size(const F *z) {
    if constexpr (activated)
      return softplus<F, scaled, false>(load(z)).value;
    else
      return load(z);
  }

  // N = 1: all in one loop.
  template <bool activated, bool scaled, bool writes> void recur_one(int64_t k, int n) {
    for (int64_t j = 0; j < p.pitch; j += lanes<F>) {
      const Vector<F> a = load(p.a_log2(k) + j), skip = load(p.skip + j);
      Vector<F> state = load(&h[j]);
      for (int t = 0; t < n; ++t) {
        const Vector<F> x = load(x_row[t] + j);
        const Vector<F> d = step_size<activated, scaled>(delta + t * p.pitch + j);
        state = exp2<F>(d * a) * state + d * x * B[t];
        store(y_row[t] + j, state * C[t] + (writes ? skip * x : load(y_row[t] + j)));
      }
      store(&h[j], state);
    }
  }

  template <bool activated, bool scaled> void recur_many(int64_t k, int n) {
    for (int64_t j = 0; j < p.pitch; j += lanes<F>) {
      const Vector<F> skip = load(p.skip + j);
      Vector<F> sum[tile], d[tile], dx[tile];
      for (int t = 0; t < n; ++t) {
        const Vector<F> x = load(x_row[t] + j);
        d[t] = step_size<activated, scaled>(delta + t * p.pitch + j);
        dx[t] = d[t] * x;
        sum[t] = k ? load(y_row[t] + j) : skip * x;
      }
      for (int64_t i = 0; i < s.n_state; ++i) {
        const Vector<F> a = load(p.a_log2(k) + i * p.pitch + j);
        Vector<F> state = load(&h[i * p.pitch + j]);
        for (int t = 0; t < n; ++t) {
          state = exp2<F>(d[t] * a) * state + dx[t] * B[t * s.n_state + i];
          sum[t] += state * C[t * s.n_state + i];
        }
        store(&h[i * p.pitch + j], state);
      }
      for (int t = 0; t < n; ++t) store(y_row[t] + j, sum[t]);
    }
  }
};

// The number of channels of a block, a multiple of the lanes: that with which the slowest thread is done first.
template <class F> int64_t block_width(const vmamba_scan &s) {
  constexpr int64_t overhead = 8;  // what a block costs beside its channels, in channels
  int64_t best = widest, least = INT64_MAX;
  for (int64_t width = widest; width > 0; width -= lanes<F>) {
    const int64_t blocks = (s.channels + width - 1) / width, tasks = blocks * s.batch;
    const int64_t cost = (tasks + s.threads - 1) / s.threads * (std::min(width, s.channels) + overhead);
    if (cost < least) best = width, least = cost;
  }
  return best;
}

template <class F> int run(const vmamba_scan &s, void *y, void *last, void *states) {
  return each_block<Forward<F>>(
      s, block_width<F>(s), s.batch,
      [&] {
        return new Forward<F>(s, static_cast<F *>(y), static_cast<F *>(last), static_cast<F *>(states));
      },
      [](Forward<F> &worker, int64_t b, int64_t, int64_t first, int64_t count) {
        worker.image(b, first, count);
      });
}

}  // namespace

int forward(const vmamba_scan &s, void *y, void *last, void *states) {
  return s.state_type == VMAMBA_FLOAT64 ? run<double>(s, y, last, states) : run<float>(s, y, last, states);
}

void bare_loop(int64_t values, int64_t threads) {
  constexpr int64_t cached = 1024;
  const int64_t rounds = (values + cached - 1) / cached;
  in_shares(rounds, threads, [](int64_t round, int64_t last) {
    alignas(64) float from[cached], to[cached];
    for (int64_t i = 0; i < cached; ++i) from[i] = float(i % 37) / 10 - 3;
    const Vector<float> a = splat<float>(-1.4f);
    for (; round < last; ++round) {
      for (int64_t i = 0; i < cached; i += lanes<float>)
        store(to + i, exp2<float>(softplus<float, true, false>(load(from + i)).value * a));
      asm volatile("" : : "r"(to), "r"(from) : "memory");  // the values are wanted
    }
  });
}

}  // namespace VMAMBA_TARGET
