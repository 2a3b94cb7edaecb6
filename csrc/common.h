// What the forward and the backward of the scan share: reading operands, walking routes, delta's product.
//
// B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta.
//
// The channels lie in the lanes of the vectors. A task is a block of at most 64 channels of some images: it
// walks an image along each route, a tile of positions at a time, so that the state and all that a tile
// needs stay in the nearest cache, and nothing is ever stored a route. Delta is formed from its low-rank
// factors tile by tile.
//
// No sum depends on how tasks are dealt to threads: the results are the same bits for any number of them.
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

template <class F> constexpr int64_t type_of = sizeof(F) == 4 ? VMAMBA_FLOAT32 : VMAMBA_FLOAT64;

// As `read`, without a call for what most images have: few values of F's own type.
template <class F> VMAMBA_INLINE void read_few(const vmamba_image &image, int64_t offset, int64_t n, F *to) {
  if (image.type != type_of<F>) return read(image, offset, n, to);
  const F *from = static_cast<const F *>(image.data) + offset;
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// A row as it lies if its type is F's, else copied to `buffer`.
template <class F> VMAMBA_INLINE const F *row(const vmamba_image &image, int64_t offset, int64_t n, F *buffer) {
  if (image.type == type_of<F>) return static_cast<const F *>(image.data) + offset;
  read(image, offset, n, buffer);
  return buffer;
}

// The positions of a route, one after the other.
struct Walk {
  int64_t height, width;
  bool columns, reversed;
  int64_t h, w;

  Walk(const vmamba_scan &s, int64_t route, int64_t start)
      : height(s.height), width(s.width), columns(route & 1), reversed(route & 2) {
    const int64_t t = reversed ? height * width - 1 - start : start;
    h = columns ? t % height : t / width;
    w = columns ? t / height : t % width;
  }

  void step() {
    const int64_t by = reversed ? -1 : 1;
    if (columns) {
      h += by;
      if (h < 0 || h == height) h -= by * height, w += by;
    } else {
      w += by;
      if (w < 0 || w == width) w -= by * width, h += by;
    }
  }

  int64_t at(const vmamba_image &image) const { return h * image.stride[1] + w * image.stride[2]; }
  int64_t flat() const { return h * width + w; }
};

template <class F> std::unique_ptr<F[]> allocate(int64_t n) { return std::unique_ptr<F[]>(new F[size_t(n)]); }

// The scan's parameters for a block of channels, in the order in which the loops read them. Rows are of
// `pitch` channels, those beyond the block zero.
template <class F> struct Parameters {
  const vmamba_scan &s;
  const bool scaled;  // z comes with the factor log2(e)
  int64_t first = -1, count = 0, pitch = 0;
  std::unique_ptr<F[]> A, A_log2, weight, bias;  // [K][N], [K][N], [K][R], [K] rows
  F skip[widest];                                // the sum of D over routes

  explicit Parameters(const vmamba_scan &s)
      : s(s),
        scaled(s.softplus && s.rank),
        A(allocate<F>(s.n_routes * s.n_state * widest)),
        A_log2(allocate<F>(s.n_routes * s.n_state * widest)),
        weight(allocate<F>(s.n_routes * s.rank * widest)),
        bias(allocate<F>(s.n_routes * widest)) {}

  const F *a(int64_t k) const { return A.get() + k * s.n_state * pitch; }
  const F *a_log2(int64_t k) const { return A_log2.get() + k * s.n_state * pitch; }
  const F *w(int64_t k) const { return weight.get() + k * s.rank * pitch; }
  const F *b(int64_t k) const { return bias.get() + k * pitch; }

  // (K, D, n) → [K][n] rows
  void turn(const void *from, int64_t n, F factor, F *to) const {
    const F *p = static_cast<const F *>(from);
    for (int64_t k = 0; k < s.n_routes; ++k)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < pitch; ++d)
          *to++ = d < count ? p[(k * s.channels + first + d) * n + i] * factor : F(0);
  }

  void take(int64_t start, int64_t n) {
    if (start == first && n == count) return;
    first = start, count = n, pitch = (n + lanes<F> - 1) / lanes<F> * lanes<F>;
    const F scale = scaled ? Simd<F>::log2e : F(1);
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

// A row of a block's channels, padded with zeros.
template <class F> void read_padded(const vmamba_image &image, int64_t offset, const Parameters<F> &p, F *to) {
  read(image, offset, p.count, to);
  std::fill(to + p.count, to + p.pitch, F(0));
}

// rows[t] = bias + in[t] · weight: (positions, R) · (R, pitch).
template <class F, int T, int J>
VMAMBA_INLINE void product_tile(const F *const *in, int64_t rank, const F *weight, const F *bias, int64_t pitch,
                                F *rows) {
  Vector<F> sum[T][J];
  for (int t = 0; t < T; ++t)
    for (int j = 0; j < J; ++j) sum[t][j] = load(bias + j * lanes<F>);
  for (int64_t r = 0; r < rank; ++r) {
    Vector<F> w[J];
    for (int j = 0; j < J; ++j) w[j] = load(weight + r * pitch + j * lanes<F>);
    for (int t = 0; t < T; ++t)
      for (int j = 0; j < J; ++j) sum[t][j] += w[j] * in[t][r];
  }
  for (int t = 0; t < T; ++t)
    for (int j = 0; j < J; ++j) store(rows + t * pitch + j * lanes<F>, sum[t][j]);
}

template <class F, int J>
VMAMBA_INLINE void product_columns(const F *const *in, int n, int64_t rank, const F *weight, const F *bias,
                                   int64_t pitch, F *rows) {
  int t = 0;
  for (; t + 4 <= n; t += 4) product_tile<F, 4, J>(in + t, rank, weight, bias, pitch, rows + t * pitch);
  for (; t < n; ++t) product_tile<F, 1, J>(in + t, rank, weight, bias, pitch, rows + t * pitch);
}

template <class F>
void product(const F *const *in, int n, int64_t rank, const F *weight, const F *bias, int64_t pitch, F *rows) {
  constexpr int wide = VMAMBA_VECTOR_BYTES == 64 ? 4 : 2;  // as many sums as there are registers for
  int64_t d = 0;
  for (; d + wide * lanes<F> <= pitch; d += wide * lanes<F>)
    product_columns<F, wide>(in, n, rank, weight + d, bias + d, pitch, rows + d);
  switch ((pitch - d) / lanes<F>) {
    case 3: product_columns<F, 3>(in, n, rank, weight + d, bias + d, pitch, rows + d); break;
    case 2: product_columns<F, 2>(in, n, rank, weight + d, bias + d, pitch, rows + d); break;
    case 1: product_columns<F, 1>(in, n, rank, weight + d, bias + d, pitch, rows + d); break;
  }
}

// What softplus takes, for n positions of a route from `walk` on, as rows of `pitch`. With low rank, `in`
// (n) is set to the rows of delta, which are copied to `buffer` (n, R) where their type is not F.
template <class F>
void preactivation(const Parameters<F> &p, int64_t b, int64_t k, Walk walk, int n, const F **in, F *buffer,
                   F *rows) {
  const vmamba_scan &s = p.s;
  const int64_t start = b * s.delta.stride[0] + k * s.delta.stride[3];
  if (s.rank) {
    for (int t = 0; t < n; ++t, walk.step())
      in[t] = row(s.delta, start + walk.at(s.delta), s.rank, buffer + t * s.rank);
    product(in, n, s.rank, p.w(k), p.b(k), p.pitch, rows);
    return;
  }
  for (int t = 0; t < n; ++t, walk.step(), rows += p.pitch) {
    read_padded(s.delta, start + walk.at(s.delta) + p.first, p, rows);
    for (int64_t d = 0; d < p.pitch; ++d) rows[d] += p.b(k)[d];
  }
}

// Runs `body(first, last)` for as many shares of the tasks as there are threads, each in a thread of its own.
template <class Body> void in_shares(int64_t tasks, int64_t threads, const Body &body) {
  const int64_t shares = std::max<int64_t>(1, std::min(threads, tasks));
  const auto share = [&](int64_t i) { body(i * tasks / shares, (i + 1) * tasks / shares); };
#ifdef __SANITIZE_THREAD__  // it does not see how OpenMP's threads wait for each other
  std::vector<std::thread> others;
  for (int64_t i = 1; i < shares; ++i) others.emplace_back(share, i);
  share(0);
  for (std::thread &other : others) other.join();
#else
#pragma omp parallel for num_threads(int(shares)) schedule(static)
  for (int64_t i = 0; i < shares; ++i) share(i);
#endif
}

// Runs `body(worker, group, block, first, count)` for each of `groups` and each block of channels `width` wide;
// a worker belongs to a thread.
template <class Worker, class Make, class Body>
int each_block(const vmamba_scan &s, int64_t width, int64_t groups, const Make &make, const Body &body) {
  const int64_t blocks = (s.channels + width - 1) / width;
  std::atomic<int> status = VMAMBA_OK;
  in_shares(blocks * groups, s.threads, [&](int64_t task, int64_t last) {
    try {
      const std::unique_ptr<Worker> worker(make());
      for (; task < last; ++task) {
        const int64_t block = task / groups, first = block * width;
        body(*worker, task % groups, block, first, std::min(width, s.channels - first));
      }
    } catch (const std::bad_alloc &) {
      status = VMAMBA_OUT_OF_MEMORY;
    }
  });
  return status;
}

}  // namespace VMAMBA_TARGET
