// The forward of the 2D selective scan, for the one instruction set that this file is compiled for.
#include "common.h"

namespace VMAMBA_TARGET {
namespace {

// For n_state = 1: how many vectors of channels, and how many positions, are computed side by side.
template <class F> constexpr int vectors_at_once = sizeof(F) == 8 ? 1 : VMAMBA_VECTOR_BYTES == 64 ? 2 : 4;
template <class F> constexpr int positions_at_once = sizeof(F) == 4 && VMAMBA_VECTOR_BYTES == 64 ? 3 : 1;

template <class F> struct Forward {
  const vmamba_scan &s;
  F *const y, *const last, *const states;
  Parameters<F> p;
  std::unique_ptr<F[]> h, B, C, delta_copies;  // [n] rows, [tile][n], [tile][n], [tile][r] or rows
  alignas(64) F z[tile * widest];              // [vectors][tile] vectors
  alignas(64) F x_copies[tile * widest], y_copies[tile * widest];
  const F *x_row[tile + ahead], *delta_row[tile];
  F *y_row[tile + ahead], *y_home[tile];

  Forward(const vmamba_scan &s, F *y, F *last, F *states)
      : s(s),
        y(y),
        last(last),
        states(states),
        p(s),
        h(allocate<F>(s.n_state * widest)),
        B(allocate<F>(tile * s.n_state)),
        C(allocate<F>(tile * s.n_state)),
        delta_copies(allocate<F>(tile * (s.rank ? s.rank : widest))) {}

  void image(int64_t b, int64_t first, int64_t count) {
    p.load_block(first, count);
    for (int64_t k = 0; k < s.n_routes; ++k) route(b, k);
  }

  void route(int64_t b, int64_t k) {
    const int64_t length = s.height * s.width, slots = (length + s.state_stride - 1) / s.state_stride;
    const int64_t column = (b * s.n_routes + k) * s.channels + p.first;  // of (b, k, d)
    std::fill_n(h.get(), s.n_state * p.pitch, F(0));
    if (s.initial) p.turn_rows(static_cast<const F *>(s.initial) + column * s.n_state, s.n_state, F(1), h.get());
    for (int64_t t = 0; t < length; t += tile) {
      if (t % s.state_stride == 0)
        for (int64_t n = 0; n < s.n_state; ++n)
          std::copy_n(&h[n * p.pitch], p.count,
                      states + (((b * s.n_routes + k) * slots + t / s.state_stride) * s.n_state + n) *
                                   s.channels + p.first);
      positions(b, k, t, int(std::min<int64_t>(tile, length - t)));
    }
    for (int64_t n = 0; n < s.n_state; ++n)
      for (int64_t d = 0; d < p.count; ++d) last[(column + d) * s.n_state + n] = h[n * p.pitch + d];
  }

  // n positions of a route, from the `start`-th on.
  void positions(int64_t b, int64_t k, int64_t start, int n) {
    const bool whole = p.pitch == p.count;
    each_run(s, k, start, n, [&](const Run &run) {
      rows_of(s.x, b * s.x.stride[0] + p.first, run, p.count, p.pitch, x_copies, x_row);
      delta_rows(p, b, k, run, delta_copies.get(), delta_row);
      copy_rows(s.B, b * s.B.stride[0] + k * s.B.stride[3], run, s.n_state, B.get());
      copy_rows(s.C, b * s.C.stride[0] + k * s.C.stride[3], run, s.n_state, C.get());
      F *const home = y + (b * s.height * s.width + run.flat(s.width)) * s.channels + p.first;
      for (int i = 0; i < run.count; ++i)
        y_row[run.first + i] = home + i * run.flat_step(s.width) * s.channels;
    });
    if (!whole)
      for (int t = 0; t < n; ++t) {
        y_home[t] = y_row[t];
        y_row[t] = y_copies + t * p.pitch;
        if (k) std::copy_n(y_home[t], p.count, y_row[t]);
      }
    std::fill_n(x_row + n, ahead, x_row[n - 1]);
    std::fill_n(y_row + n, ahead, y_row[n - 1]);
    preactivation(p, k, delta_row, n, z, {lanes<F>, tile * lanes<F>});
    if (s.softplus)
      p.usual ? recur<true, true>(k, n) : recur<true, false>(k, n);
    else
      recur<false, false>(k, n);
    if (!whole)
      for (int t = 0; t < n; ++t) std::copy_n(y_row[t], p.count, y_home[t]);
  }

  // Rows that the hardware does not prefetch: on a column route they lie in different rows of the image.
  template <int P> VMAMBA_INLINE void prefetch(int t, int64_t j) const {
    for (int i = 0; i < P; i += line<F> / lanes<F>, j += line<F>) {
      __builtin_prefetch(x_row[t] + j);
      __builtin_prefetch(y_row[t] + j, 1);
    }
  }

  template <bool activated, bool usual> void recur(int64_t k, int n) {
    const int64_t vectors = p.pitch / lanes<F>;
    if (s.n_state > 1) {
      in_pieces<pack<F>>(vectors, [&](int64_t j, auto P) { recur_many<activated, usual, P>(k, j * lanes<F>, n); });
      return;
    }
    in_pieces<vectors_at_once<F>>(vectors, [&](int64_t j, auto P) {
      k ? recur_one<activated, usual, false, P>(k, j * lanes<F>, n)
        : recur_one<activated, usual, true, P>(k, j * lanes<F>, n);
    });
  }

  // The argument of softplus at position t, for the i-th vector after channel j.
  VMAMBA_INLINE Vector<F> argument(int64_t j, int64_t i, int64_t t) const {
    return load(z + j * tile + (i * tile + t) * lanes<F>);
  }

  template <bool activated, bool usual, int P> VMAMBA_INLINE static Pack<F, P> step_size(Pack<F, P> z) {
    if constexpr (activated)
      return softplus<F, usual, false>(z).value;
    else
      return z;
  }

  // n_state = 1: all in one loop.
  template <bool activated, bool usual, bool writes, int P> void recur_one(int64_t k, int64_t j, int n) {
    const Pack<F, P> a = row<F, P>(p.a_log2(k) + j), skip = row<F, P>(p.skip + j);
    Pack<F, P> state = row<F, P>(&h[j]);
    in_pieces<positions_at_once<F>>(n, [&](int64_t t, auto T) VMAMBA_INLINED {
      using All = Pack<F, T * P>;
      const All d = step_size<activated, usual>(All::of([&](int i) { return argument(j, i % P, t + i / P); }));
      const All decay = exp2<true, usual>(rounded(d * All::of([&](int i) { return a.v[i % P]; })));
      for (int i = 0; i < T; ++i, ++t) {
        prefetch<P>(t + ahead, j);
        const Pack<F, P> x = row<F, P>(x_row[t] + j);
        state = fma(slice<P>(decay, i), state, slice<P>(d, i) * x * B[t]);
        keep(y_row[t] + j, fma(state, Pack<F, P>(C[t]), writes ? skip * x : row<F, P>(y_row[t] + j)));
      }
    });
    keep(&h[j], state);
  }

  template <bool activated, bool usual, int P> void recur_many(int64_t k, int64_t j, int n) {
    Pack<F, P> sum[tile], d[tile], dx[tile];
    const Pack<F, P> skip = row<F, P>(p.skip + j);
    for (int t = 0; t < n; ++t) {
      const Pack<F, P> x = row<F, P>(x_row[t] + j);
      d[t] = step_size<activated, usual>(Pack<F, P>::of([&](int i) { return argument(j, i, t); }));
      dx[t] = d[t] * x;
      sum[t] = k ? row<F, P>(y_row[t] + j) : skip * x;
    }
    for (int64_t i = 0; i < s.n_state; ++i) {
      const Pack<F, P> a = row<F, P>(p.a_log2(k) + i * p.pitch + j);
      Pack<F, P> state = row<F, P>(&h[i * p.pitch + j]);
      for (int t = 0; t < n; ++t) {
        state = fma(exp2<true, usual>(rounded(d[t] * a)), state, dx[t] * B[t * s.n_state + i]);
        sum[t] = fma(state, Pack<F, P>(C[t * s.n_state + i]), sum[t]);
      }
      keep(&h[i * p.pitch + j], state);
    }
    for (int t = 0; t < n; ++t) keep(y_row[t] + j, sum[t]);
  }
};

// The number of channels of a block, a multiple of the lanes, for which the slowest thread has the least work.
template <class F> int64_t block_width(const vmamba_scan &s) {
  constexpr int64_t overhead = 8;  // fixed cost of a block, in channels
  int64_t best = widest, least = INT64_MAX;
  for (int64_t width = widest; width > 0; width -= lanes<F>) {
    const int64_t blocks = (s.channels + width - 1) / width, tasks = blocks * s.batch;
    const int64_t rest = width % (vectors_at_once<F> * lanes<F>) ? lanes<F> : 0;  // fewer at once cost more
    const int64_t cost = (tasks + s.threads - 1) / s.threads * (std::min(width, s.channels) + overhead + rest);
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
  constexpr int at_once = pack<float>;
  constexpr int64_t rounds_of_task = 64;
  const int64_t rounds = (values + cached - 1) / cached, tasks = (rounds + rounds_of_task - 1) / rounds_of_task;
  deal(tasks, threads, [&](const auto &next) {
    alignas(64) float from[cached], to[cached];
    for (int64_t i = 0; i < cached; ++i) from[i] = float(i % 37) / 10 - 3;
    constexpr float a = -1.4f;
    for (int64_t task; (task = next()) < tasks;) {
      const int64_t last = std::min(rounds, (task + 1) * rounds_of_task);
      for (int64_t round = task * rounds_of_task; round < last; ++round) {
        for (int64_t i = 0; i < cached; i += at_once * lanes<float>) {
          const auto z = Pack<float, at_once>::of([&](int j) { return load(from + i + j * lanes<float>); });
          const auto decay = exp2<true, true>(rounded(softplus<float, true, false>(z).value * a));
          for (int j = 0; j < at_once; ++j) store(to + i + j * lanes<float>, decay.v[j]);
        }
        asm volatile("" : : "r"(to), "r"(from) : "memory");  // keeps the loop from being optimised away
      }
    }
  });
}

}  // namespace VMAMBA_TARGET
