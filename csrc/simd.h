// Vectors of the instruction set that a file is compiled for, and the functions of them that the scan needs.
//
// Written with the vector extensions that GCC and Clang share; only what they cannot say is an intrinsic.
// Everything stands in a namespace of its own for each instruction set, so that the linker never merges two.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define VMAMBA_AVX512 1
#define VMAMBA_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VMAMBA_VECTOR_BYTES 32
#else
#define VMAMBA_VECTOR_BYTES 16
#endif

#define VMAMBA_INLINE inline __attribute__((always_inline))

namespace VMAMBA_TARGET {

template <class F> struct Simd;

// The polynomials are minimax fits of the relative error, the constant term of each exactly 1 (degree 6 and 11; 9 and 20):
//   2^r = 1 + r·(exp2)(r) on [-1/2, 1/2], error 2.6e-9 and 1.8e-17 (float and double);
//   log(1 + u) = u + u²·(log1p)(u) on [0, 1], error 5.1e-9 and 9.5e-18.
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(VMAMBA_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  static constexpr int32_t sign = INT32_MIN, bias = 127, mantissa = 23;
  static constexpr float round = 12582912.0f;  // 1.5·2^23: added and taken off, it rounds to an integer
  static constexpr float lowest = -151, highest = 129;
  static constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // the high one in few bits
  static constexpr float exp2[] = {0.69314724f,  0.24022652f,   0.055503104f,
                                   0.009617693f, 0.0013406643f, 0.00015594678f};
  static constexpr float log1p[] = {-0.4999993f,  0.33330512f,  -0.24958585f, 0.19695391f,  -0.15355372f,
                                    0.10680519f, -0.057664108f, 0.020204417f, -0.0033184374f};
};

template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(VMAMBA_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  static constexpr int64_t sign = INT64_MIN, bias = 1023, mantissa = 52;
  static constexpr double round = 6755399441055744.0;  // 1.5·2^52
  static constexpr double lowest = -1076, highest = 1025;
  static constexpr double log2e = 1.4426950408889634, ln2 = 0.6931471805599453;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp2[] = {0.6931471805599457,     0.24022650695910097,    0.0555041086647904,
                                    0.009618129107607004,   0.0013333558153439506,  0.00015403530441569956,
                                    1.5252727385520852e-05, 1.3215442676609272e-06, 1.0180647562417255e-07,
                                    7.072570169846751e-09,  4.078081627399934e-10};
  static constexpr double log1p[] = {-0.4999999999999946, 0.3333333333323503, -0.24999999993675728,
                                     0.1999999979129871, -0.16666662498095214, 0.14285658892667707,
                                     -0.12499479577117537, 0.11107505793756967, -0.0998101407417031,
                                     0.09013150992478007, -0.08081205253064329, 0.07035531175756063,
                                     -0.057501871183077854, 0.04229996987377461, -0.026743846775108687,
                                     0.013838517111809296, -0.0055430753459873834, 0.0015957304499333179,
                                     -0.00029175915969763727, 2.5329757600614063e-05};
};

template <class F> using Vector = typename Simd<F>::V;
template <class F> constexpr int lanes = VMAMBA_VECTOR_BYTES / sizeof(F);

template <class F> VMAMBA_INLINE Vector<F> load(const F *p) {
  return *reinterpret_cast<const typename Simd<F>::Unaligned *>(p);
}

template <class F> VMAMBA_INLINE void store(F *p, Vector<F> v) {
  *reinterpret_cast<typename Simd<F>::Unaligned *>(p) = v;
}

template <class F> VMAMBA_INLINE Vector<F> splat(F f) { return Vector<F>{} + f; }

// c[first] + c[first + 1] x + … of `count` terms, with powers[i] = x^(2^i). Terms are joined in pairs (Estrin's
// scheme): the loops of the scan wait for results, so the shorter chain wins over the fewer operations.
template <class F, int first, int count, int n>
VMAMBA_INLINE Vector<F> polynomial(const F (&c)[n], const Vector<F> *powers) {
  if constexpr (count == 1) {
    return splat<F>(c[first]);
  } else if constexpr (count == 2) {
    return powers[0] * c[first + 1] + c[first];
  } else {
    constexpr int level = count > 16 ? 4 : count > 8 ? 3 : count > 4 ? 2 : 1, low = 1 << level;
    return polynomial<F, first + low, count - low>(c, powers) * powers[level] +
           polynomial<F, first, low>(c, powers);
  }
}

template <class F, int n> VMAMBA_INLINE Vector<F> polynomial(const F (&c)[n], Vector<F> x) {
  Vector<F> powers[5] = {x};
#pragma GCC unroll 4
  for (int i = 1; i < 5; ++i) powers[i] = powers[i - 1] * powers[i - 1];
  return polynomial<F, 0, n>(c, powers);
}

// 2^r · 2^n for r in [-1/2, 1/2] and a whole n.
template <class F> VMAMBA_INLINE Vector<F> power(Vector<F> r, Vector<F> n) {
  using S = Simd<F>;
  const Vector<F> p = r * polynomial<F>(S::exp2, r) + F(1);
#ifdef VMAMBA_AVX512
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)_mm512_scalef_ps((__m512)p, (__m512)n);
  else
    return (Vector<F>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
#else
  // In two factors, as 2^n itself may be no normal number. The integer of a NaN is any, which does no harm.
  using I = typename S::I;
  const I whole = (I)(n + S::round) - (I)splat<F>(S::round), half = whole >> 1;
  return p * (Vector<F>)((half + S::bias) << S::mantissa) *
         (Vector<F>)((whole - half + S::bias) << S::mantissa);
#endif
}

// 2^t, an infinity and NaN included.
template <class F> VMAMBA_INLINE Vector<F> exp2(Vector<F> t) {
#ifdef VMAMBA_AVX512
  constexpr int nearest = 0x08;
  if constexpr (sizeof(F) == 4)  // what `reduce` leaves of an infinity is 0
    return power<F>((Vector<F>)_mm512_reduce_ps((__m512)t, nearest),
                    (Vector<F>)_mm512_roundscale_ps((__m512)t, nearest));
  else
    return power<F>((Vector<F>)_mm512_reduce_pd((__m512d)t, nearest),
                    (Vector<F>)_mm512_roundscale_pd((__m512d)t, nearest));
#else
  using S = Simd<F>;
  t = t < S::lowest ? splat<F>(S::lowest) : t;  // so written, both keep NaN
  t = t > S::highest ? splat<F>(S::highest) : t;
  const Vector<F> n = (t + S::round) - S::round;
  return power<F>(t - n, n);
#endif
}

// e^z for z ≤ 0, precise also where z·log2(e) would lose digits.
template <class F> VMAMBA_INLINE Vector<F> exp_negative(Vector<F> z) {
  using S = Simd<F>;
  z = z < S::lowest * S::ln2 ? splat<F>(S::lowest * S::ln2) : z;
  const Vector<F> n = (z * S::log2e + S::round) - S::round;
  return power<F>(((z - n * S::ln2_high) - n * S::ln2_low) * S::log2e, n);
}

template <class F> struct Softplus {
  Vector<F> value, slope;
};

// softplus(z) = max(z, 0) + log(1 + e^-|z|) and, if asked for, its derivative 1 / (1 + e^-z).
//
// With `scaled`, t = z·log2(e), which saves the exponential its reduction; without, t = z.
template <class F, bool scaled, bool with_slope> VMAMBA_INLINE Softplus<F> softplus(Vector<F> t) {
  using S = Simd<F>;
  using I = typename S::I;
  const Vector<F> magnitude = (Vector<F>)((I)t | S::sign);  // -|t|
  const Vector<F> u = scaled ? exp2<F>(magnitude) : exp_negative<F>(magnitude);
  Vector<F> linear = t > F(0) ? t : Vector<F>{};
  if constexpr (scaled) linear *= S::ln2;
  Softplus<F> found;
  found.value = u * u * polynomial<F>(S::log1p, u) + (u + linear);
  if constexpr (with_slope) found.slope = (t > F(0) ? splat<F>(1) : u) / (u + F(1));
  return found;
}

// The sum over the lanes of each of `lanes` vectors, as one vector. `v` is overwritten.
template <class F, int half, int... i>
VMAMBA_INLINE Vector<F> fold_pair(Vector<F> a, Vector<F> b, std::integer_sequence<int, i...>) {
  // Of groups of 2·half lanes the two halves are added, those of a going before those of b, pair by pair.
  constexpr int n = sizeof...(i);
  return __builtin_shufflevector(a, b, ((i / half) % 2 * n + i / half / 2 * 2 * half + i % half)...) +
         __builtin_shufflevector(a, b, ((i / half) % 2 * n + i / half / 2 * 2 * half + half + i % half)...);
}

template <class F, int half = lanes<F> / 2> VMAMBA_INLINE Vector<F> sum_lanes(Vector<F> *v) {
  constexpr int pairs = half;
#pragma GCC unroll 8
  for (int i = 0; i < pairs; ++i)
    v[i] = fold_pair<F, half>(v[i], v[i + pairs], std::make_integer_sequence<int, lanes<F>>());
  if constexpr (half > 1)
    return sum_lanes<F, half / 2>(v);
  else
    return v[0];
}

}  // namespace VMAMBA_TARGET
