// What the forward and the backward of the scan share: reading operands, walking routes, delta's product.
//
// Sizes: b batch, h height, w width, l = h·w, d channels, k routes, n state size, r rank of delta.
//
// Vector lanes hold channels. A task is a block of at most 64 channels of several images: it walks an image
// along each route, a tile of positions at a time, so that the state and all that a tile needs stay in the L1
// cache, and no per-route copy is ever stored. Delta is formed from its low-rank factors tile by tile.
//
// In comments [k][n] rows means k·n rows, each of the block's channels.
//
// No sum depends on the number of threads, so neither does any bit of the results.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#ifdef __SANITIZE_THREAD__
#include <thread>
#include <vector>
#endif

#include "kernel.h"
#include "simd.h"

namespace VMAMBA_TARGET {

constexpr int widest = 64;  // channels of a block
constexpr int tile = 64;    // positions of a tile
constexpr int ahead = 6;    // positions by which rows are prefetched
template <class F> constexpr int64_t line = 64 / sizeof(F);  // values in a cache line

// float16 or bfloat16 → float, exactly.
VMAMBA_INLINE float widen(uint16_t bits, int64_t type) {
  uint32_t wide;
  float f;
  if (type == VMAMBA_BFLOAT16) {
    wide = uint32_t(bits) << 16;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
  const float scale = 0x1p112f;  // the difference of the exponents' biases; right for subnormals too
  std::memcpy(&f, &rest, 4);
  f *= scale;
  std::memcpy(&wide, &f, 4);
  if (rest >= 0x0f800000) wide |= 0x7f800000;  // an infinity or NaN
  wide |= sign;
  std::memcpy(&f, &wide, 4);
  return f;
}

template <class F> void read(const vmamba_image &image, int64_t offset, int64_t n, F *to) {
  switch (image.type) {
    case VMAMBA_FLOAT32: {
      const float *from = static_cast<const float *>(image.data) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = F(from[i]);
      break;
    }
    case VMAMBA_FLOAT64: {
      const double *from = static_cast<const double *>(image.data) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = F(from[i]);
      break;
    }
    case VMAMBA_BFLOAT16: {
      const uint16_t *from = static_cast<const uint16_t *>(image.data) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = F(widen(from[i], VMAMBA_BFLOAT16));
      break;
    }
    default: {
      const uint16_t *from = static_cast<const uint16_t *>(image.data) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = F(widen(from[i], VMAMBA_FLOAT16));
    }
  }
}

VMAMBA_INLINE int64_t size_of(int64_t type) {
  return type == VMAMBA_FLOAT64 ? 8 : type == VMAMBA_FLOAT32 ? 4 : 2;
}

template <class F> constexpr int64_t type_of = sizeof(F) == 4 ? VMAMBA_FLOAT32 : VMAMBA_FLOAT64;

// Consecutive positions of a route on one straight line through the image: the first is number `first` of a
// tile and at (h, w); each next one is (dh, dw) further.
struct Run {
  int first, count;
  int64_t h, w, dh, dw;

  int64_t at(const vmamba_image &image) const { return h * image.stride[1] + w * image.stride[2]; }
  int64_t step(const vmamba_image &image) const { return dh * image.stride[1] + dw * image.stride[2]; }
  int64_t flat(int64_t width) const { return h * width + w; }
  int64_t flat_step(int64_t width) const { return dh * width + dw; }
};

// The same of a route that is given position by position. Each step that stays in the image's rows joins a run:
// along a row, a column or a diagonal.
template <class Body> void each_run_of_order(int64_t width, const int64_t *order, int n, const Body &body) {
  for (int first = 0, count; first < n; first += count) {
    const int64_t h = order[first] / width, w = order[first] % width;
    int64_t dh = 0, dw = 0;
    count = 1;
    if (first + 1 < n) {
      const int64_t next = order[first + 1], step = next - order[first];
      dh = next / width - h, dw = next % width - w;
      int64_t in_row = w;
      do {
        in_row += dw;
        ++count;
      } while (first + count < n && order[first + count] - order[first + count - 1] == step && in_row + dw >= 0 &&
               in_row + dw < width);
    }
    body(Run{first, count, h, w, dh, dw});
  }
}

// The n positions of route k from the `start`-th on, as runs.
template <class Body>
VMAMBA_INLINE void each_run(const vmamba_scan &s, int64_t k, int64_t start, int n, const Body &body) {
  if (s.orders[k]) return each_run_of_order(s.width, s.orders[k] + start, n, body);
  const bool columns = s.routes[k] & 1, reversed = s.routes[k] & 2;
  const int64_t length = columns ? s.height : s.width, lines = columns ? s.width : s.height;
  const int64_t by = reversed ? -1 : 1;
  int64_t line = start / length, place = start % length;
  for (int first = 0, count; first < n; first += count, place = 0, ++line) {
    count = int(std::min<int64_t>(n - first, length - place));
    const int64_t in_line = reversed ? length - 1 - place : place, of_line = reversed ? lines - 1 - line : line;
    if (columns)
      body(Run{first, count, in_line, of_line, by, 0});
    else
      body(Run{first, count, of_line, in_line, 0, by});
  }
}

// Pointers to rows of n values: into the tensor if they need no conversion and no padding to `pitch`, else to
// copies.
template <class F>
VMAMBA_INLINE void rows_of(const vmamba_image &image, int64_t offset, const Run &run, int64_t n, int64_t pitch,
                           F *copies, const F **rows) {
  const int64_t at = offset + run.at(image), step = run.step(image);
  copies += run.first * pitch, rows += run.first;
  if (image.type == type_of<F> && n == pitch) {
    const F *const from = static_cast<const F *>(image.data) + at;
    for (int i = 0; i < run.count; ++i) rows[i] = from + i * step;
    return;
  }
  for (int i = 0; i < run.count; ++i, copies += pitch) {
    read(image, at + i * step, n, copies);
    std::fill(copies + n, copies + pitch, F(0));
    rows[i] = copies;
  }
}

// Copies rows of n values contiguously.
template <class F>
VMAMBA_INLINE void copy_rows(const vmamba_image &image, int64_t offset, const Run &run, int64_t n, F *to) {
  const int64_t at = offset + run.at(image), step = run.step(image);
  to += run.first * n;
  if (image.type != type_of<F>) {
    for (int i = 0; i < run.count; ++i) read(image, at + i * step, n, to + i * n);
    return;
  }
  const F *const from = static_cast<const F *>(image.data) + at;
  if (n == 1)
    for (int i = 0; i < run.count; ++i) to[i] = from[i * step];
  else
    for (int i = 0; i < run.count; ++i)
      for (int64_t j = 0; j < n; ++j) to[i * n + j] = from[i * step + j];
}

template <class F> std::unique_ptr<F[]> allocate(int64_t n) { return std::unique_ptr<F[]>(new F[size_t(n)]); }

// The scan's parameters for a block of channels, in the order in which the loops read them. Rows are of
// `pitch` channels, those beyond the block zero.
template <class F> struct Parameters {
  const vmamba_scan &s;
  // As in the model: softplus, low-rank delta, and no A above 0. Then weight and bias are scaled by log2(e), so
  // that softplus can use 2^t directly, and no exponent is positive.
  const bool usual;
  int64_t first = -1, count = 0, pitch = 0;
  std::unique_ptr<F[]> A, A_log2, weight, bias;  // [k][n], [k][n], [k][r], [k] rows
  F skip[widest];                                // the sum of D over routes

  explicit Parameters(const vmamba_scan &s)
      : s(s),
        usual(s.softplus && s.rank && !grows(s)),
        A(allocate<F>(s.n_routes * s.n_state * widest)),
        A_log2(allocate<F>(s.n_routes * s.n_state * widest)),
        weight(allocate<F>(s.n_routes * s.rank * widest)),
        bias(allocate<F>(s.n_routes * widest)) {}

  static bool grows(const vmamba_scan &s) {
    const F *const A = static_cast<const F *>(s.A);
    return std::any_of(A, A + s.n_routes * s.channels * s.n_state, [](F a) { return a > 0; });
  }

  const F *a(int64_t k) const { return A.get() + k * s.n_state * pitch; }
  const F *a_log2(int64_t k) const { return A_log2.get() + k * s.n_state * pitch; }
  const F *w(int64_t k) const { return weight.get() + k * s.rank * pitch; }
  const F *b(int64_t k) const { return bias.get() + k * pitch; }

  // Transposes (channels of the block, n) to n rows; their padding is not written.
  void turn_rows(const F *from, int64_t n, F factor, F *to) const {
    for (int64_t d = 0; d < count; ++d)
      for (int64_t i = 0; i < n; ++i) to[i * pitch + d] = from[d * n + i] * factor;
  }

  // Transposes (k, d, n) to [k][n] rows.
  void turn(const void *from, int64_t n, F factor, F *to) const {
    std::fill_n(to, s.n_routes * n * pitch, F(0));
    for (int64_t k = 0; k < s.n_routes; ++k)
      turn_rows(static_cast<const F *>(from) + (k * s.channels + first) * n, n, factor, to + k * n * pitch);
  }

  void load_block(int64_t start, int64_t n) {
    if (start == first && n == count) return;
    first = start, count = n, pitch = (n + lanes<F> - 1) / lanes<F> * lanes<F>;
    const F scale = usual ? Simd<F>::log2e : F(1);
    turn(s.A, s.n_state, F(1), A.get());
    turn(s.A, s.n_state, Simd<F>::log2e, A_log2.get());
    if (s.rank) turn(s.weight, s.rank, scale, weight.get());
    if (s.bias)
      turn(s.bias, 1, scale, bias.get());
    else
      std::fill_n(bias.get(), s.n_routes * pitch, F(0));
    std::fill_n(skip, widest, F(0));
    if (s.D)
      for (int64_t k = 0; k < s.n_routes; ++k)
        for (int64_t d = 0; d < count; ++d) skip[d] += static_cast<const F *>(s.D)[k * s.channels + first + d];
  }
};

// The rows of delta, or of its factors, of image b and route k.
template <class F>
VMAMBA_INLINE void delta_rows(const Parameters<F> &p, int64_t b, int64_t k, const Run &run, F *copies,
                              const F **rows) {
  const vmamba_image &delta = p.s.delta;
  const int64_t at = b * delta.stride[0] + k * delta.stride[3], rank = p.s.rank;
  if (rank)
    rows_of(delta, at, run, rank, rank, copies, rows);
  else
    rows_of(delta, at + p.first, run, p.count, p.pitch, copies, rows);
}

// A buffer's strides: the j-th vector of channels at position t is at t·of_position + j·of_vector.
struct Layout {
  int64_t of_position, of_vector;
};

// bias + in[t] · weight, (T, r) · (r, J vectors of channels from the j-th on).
template <class F, int T, int J>
VMAMBA_INLINE void product_tile(const Parameters<F> &p, int64_t k, const F *const *in, int64_t j, F *to,
                                Layout layout) {
  const int64_t rank = p.s.rank, d = j * lanes<F>;
  const F *const weight = p.w(k) + d, *const bias = p.b(k) + d;
  Vector<F> sum[T][J];
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < J; ++i) sum[t][i] = load(bias + i * lanes<F>);
  for (int64_t r = 0; r < rank; ++r) {
    Vector<F> w[J];
    for (int i = 0; i < J; ++i) w[i] = load(weight + r * p.pitch + i * lanes<F>);
    for (int t = 0; t < T; ++t)
      for (int i = 0; i < J; ++i) sum[t][i] = fma<F>(w[i], splat(in[t][r]), sum[t][i]);
  }
  for (int t = 0; t < T; ++t)
    for (int i = 0; i < J; ++i) store(to + t * layout.of_position + (j + i) * layout.of_vector, sum[t][i]);
}

// Splits `count` into pieces of at most `most`, the largest first, and calls body(first, size), the size a
// compile-time constant.
template <int most, class Body>
VMAMBA_INLINE void in_pieces(int64_t count, const Body &body, int64_t first = 0) {
  for (; first + most <= count; first += most) body(first, std::integral_constant<int, most>());
  if constexpr (most > 1) in_pieces<most - 1>(count, body, first);
}

// The argument of softplus (delta_weight · delta + bias), from the n rows of delta.
template <class F>
VMAMBA_NOINLINE void preactivation(const Parameters<F> &p, int64_t k, const F *const *delta, int n, F *to,
                                   Layout layout) {
  if (p.s.rank) {
    // The largest tile whose sums fit the registers.
    constexpr int wide = VMAMBA_VECTOR_BYTES == 64 ? 4 : 2, deep = VMAMBA_VECTOR_BYTES == 32 ? 6 : 4;
    in_pieces<wide>(p.pitch / lanes<F>, [&](int64_t j, auto J) VMAMBA_INLINED {
      in_pieces<deep>(n, [&](int64_t t, auto T) VMAMBA_INLINED {
        product_tile<F, T, J>(p, k, delta + t, j, to + t * layout.of_position, layout);
      });
    });
    return;
  }
  for (int t = 0; t < n; ++t)
    for (int64_t j = 0; j < p.pitch / lanes<F>; ++j)
      store(to + t * layout.of_position + j * layout.of_vector,
            load(delta[t] + j * lanes<F>) + load(p.b(k) + j * lanes<F>));
}

// Runs `work(next)` in each of up to `threads` threads. next() is the number of a task that no thread has had yet;
// from `tasks` on there is none left. A thread that gets no processor for a while leaves its tasks to the others.
template <class Work> void deal(int64_t tasks, int64_t threads, const Work &work) {
  std::atomic<int64_t> dealt = 0;
  const auto next = [&] { return dealt.fetch_add(1, std::memory_order_relaxed); };
  if (threads <= 1 || tasks <= 1) return work(next);
#ifdef __SANITIZE_THREAD__  // the sanitizer does not know OpenMP's synchronisation
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back([&] { work(next); });
  work(next);
  for (std::thread &other : others) other.join();
#else
#pragma omp parallel num_threads(int(std::min(threads, tasks)))
  work(next);
#endif
}

// Runs `body(worker, group, block, first, count)` for each of `groups` and each block of `width` channels; each
// thread that gets a task makes one worker. A task is several groups of one block, as the worker has to prepare the
// block's parameters, and small enough that each thread has about 8.
template <class Worker, class Make, class Body>
int each_block(const vmamba_scan &s, int64_t width, int64_t groups, const Make &make, const Body &body) {
  const int64_t blocks = (s.channels + width - 1) / width;
  const int64_t size = std::max<int64_t>(1, std::min(groups, blocks * groups / (8 * s.threads)));
  const int64_t of_block = (groups + size - 1) / size, tasks = blocks * of_block;
  std::atomic<int> status = VMAMBA_OK;
  deal(tasks, s.threads, [&](const auto &next) {
    try {
      std::unique_ptr<Worker> worker;
      for (int64_t task; (task = next()) < tasks;) {
        if (!worker) worker.reset(make());
        const int64_t block = task / of_block, channel = block * width;
        const int64_t first = task % of_block * size, last = std::min(first + size, groups);
        for (int64_t group = first; group < last; ++group)
          body(*worker, group, block, channel, std::min(width, s.channels - channel));
      }
    } catch (const std::bad_alloc &) {
      status = VMAMBA_OUT_OF_MEMORY;
    }
  });
  return status;
}

}  // namespace VMAMBA_TARGET
