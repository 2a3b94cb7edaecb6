// Vectors of the instruction set that a file is compiled for, and the vector functions that the scan needs.
//
// Written with the vector extensions of GCC and Clang; intrinsics only where these have no equivalent.
// Each instruction set has a separate namespace, so that the linker never merges two versions of a function.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define VMAMBA_AVX512 1
#define VMAMBA_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define VMAMBA_VECTOR_BYTES 32
#else
#ifdef __aarch64__
#include <arm_neon.h>
#endif
#define VMAMBA_VECTOR_BYTES 16
#endif

#define VMAMBA_INLINE inline __attribute__((always_inline))
#define VMAMBA_NOINLINE __attribute__((noinline))  // for loops that need all registers
#define VMAMBA_INLINED __attribute__((always_inline))  // for a lambda, after its parameters

namespace VMAMBA_TARGET {

template <class F> struct Simd;

// The polynomials are minimax fits of the relative error, the constant term of each exactly 1 (degree 6 and 11; 9 and 20):
//   2^r = 1 + r·(exp2)(r) on [-1/2, 1/2], error 2.6e-9 and 1.8e-17 (float and double);
//   log(1 + u) = u + u²·(log1p)(u) on [0, 1], error 5.1e-9 and 9.5e-18.
// Adding and subtracting `round` or `round_lifted` rounds to an integer. The sum's last bits are the biased exponents
// that `scale` and `falling_power` shift into place.
template <> struct Simd<float> {
  typedef float V __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(VMAMBA_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  static constexpr int32_t sign = INT32_MIN, mantissa = 23;
  static constexpr float round = 0x1.8p23f + 2 * 127, round_lifted = 0x1.8p23f + 127 + 64;
  static constexpr float lowest = -151, highest = 129;
  static constexpr float log2e = 1.44269504f, ln2 = 0.693147181f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;  // ln2_high has trailing zero bits
  static constexpr float exp2[] = {0.69314724f,  0.24022652f,   0.055503104f,
                                   0.009617693f, 0.0013406643f, 0.00015594678f};
  static constexpr float log1p[] = {-0.4999993f,  0.33330512f,  -0.24958585f, 0.19695391f,  -0.15355372f,
                                    0.10680519f, -0.057664108f, 0.020204417f, -0.0033184374f};
};

template <> struct Simd<double> {
  typedef double V __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(VMAMBA_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(VMAMBA_VECTOR_BYTES)));
  static constexpr int64_t sign = INT64_MIN, mantissa = 52;
  static constexpr double round = 0x1.8p52 + 2 * 1023, round_lifted = 0x1.8p52 + 1023 + 64;
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

// f - 0 is f for every f, so the compiler drops it; 0 + f is not for f = -0, and it would emit the addition.
template <class F> VMAMBA_INLINE Vector<F> splat(F f) { return f - Vector<F>{}; }

// a·b + c, fused where the instruction set can. If the compiler chose, fusing and so the last bits would depend on
// how it splits a loop.
template <class F> VMAMBA_INLINE Vector<F> fma(Vector<F> a, Vector<F> b, Vector<F> c) {
#if VMAMBA_VECTOR_BYTES == 64
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (Vector<F>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif VMAMBA_VECTOR_BYTES == 32
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (Vector<F>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else
    return (Vector<F>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// a > b ? a : b and a < b ? a : b: b where one is NaN. One instruction, which GCC does not generate by itself.
template <class F> VMAMBA_INLINE Vector<F> greater(Vector<F> a, Vector<F> b) {
#if VMAMBA_VECTOR_BYTES == 64
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)_mm512_max_ps((__m512)a, (__m512)b);
  else
    return (Vector<F>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif VMAMBA_VECTOR_BYTES == 32
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vector<F>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
template <class F> VMAMBA_INLINE Vector<F> lesser(Vector<F> a, Vector<F> b) {
#if VMAMBA_VECTOR_BYTES == 64
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)_mm512_min_ps((__m512)a, (__m512)b);
  else
    return (Vector<F>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif VMAMBA_VECTOR_BYTES == 32
  if constexpr (sizeof(F) == 4)
    return (Vector<F>)_mm256_min_ps((__m256)a, (__m256)b);
  else
    return (Vector<F>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// P vectors that are processed side by side. The functions below are long dependency chains; a processor runs
// several of them at once only if their instructions are interleaved.
template <class F, int P> struct Pack {
  Vector<F> v[P];

  Pack() = default;
  VMAMBA_INLINE Pack(F f) : Pack(of([&](int) { return splat<F>(f); })) {}

  // The pack whose i-th vector is f(i).
  template <class Make> VMAMBA_INLINE static Pack of(const Make &f) {
    Pack made;
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) made.v[i] = f(i);
    return made;
  }

  VMAMBA_INLINE friend Pack operator+(Pack a, Pack b) {
    return of([&](int i) { return a.v[i] + b.v[i]; });
  }
  VMAMBA_INLINE friend Pack operator-(Pack a, Pack b) {
    return of([&](int i) { return a.v[i] - b.v[i]; });
  }
  VMAMBA_INLINE friend Pack operator*(Pack a, Pack b) {
    return of([&](int i) { return a.v[i] * b.v[i]; });
  }
  VMAMBA_INLINE friend Pack fma(Pack a, Pack b, Pack c) {
    return of([&](int i) { return VMAMBA_TARGET::fma<F>(a.v[i], b.v[i], c.v[i]); });
  }
  VMAMBA_INLINE friend Pack operator/(Pack a, Pack b) {
    return of([&](int i) { return a.v[i] / b.v[i]; });
  }
};

template <class F, int P> VMAMBA_INLINE Pack<F, P> row(const F *from) {
  return Pack<F, P>::of([&](int i) { return load(from + i * lanes<F>); });
}

template <class F, int P> VMAMBA_INLINE void keep(F *to, Pack<F, P> v) {
#pragma GCC unroll 8
  for (int i = 0; i < P; ++i) store(to + i * lanes<F>, v.v[i]);
}

// The i-th P vectors of more.
template <int P, class F, int all> VMAMBA_INLINE Pack<F, P> slice(const Pack<F, all> &of, int i) {
  return Pack<F, P>::of([&](int l) { return of.v[i * P + l]; });
}

// A product that the compiler must not fuse with a following addition.
template <class F, int P> VMAMBA_INLINE Pack<F, P> rounded(Pack<F, P> product) {
  return Pack<F, P>::of([&](int i) {
    Vector<F> v = product.v[i];
#if defined(__x86_64__) || defined(__i386__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#else
    asm("" : "+m"(v));
#endif
    return v;
  });
}

// How many vectors to process side by side; double is not tuned for speed.
template <class F> constexpr int pack = sizeof(F) == 8 ? 1 : 4;

// c[0] + c[1] x + …, by Horner's rule: it has the fewest instructions, and its long chain matters little where several
// are computed side by side.
template <class F, int n, int P> VMAMBA_INLINE Pack<F, P> polynomial(const F (&c)[n], Pack<F, P> x) {
  Pack<F, P> sum = c[n - 1];
#pragma GCC unroll 20
  for (int i = n - 2; i >= 0; --i) sum = fma(sum, x, Pack<F, P>(c[i]));
  return sum;
}

// The same with even and odd powers (except c[0]) in two chains of half the length. If x² is known, it needs no more
// instructions.
template <class F, int n, int P>
VMAMBA_INLINE Pack<F, P> polynomial(const F (&c)[n], Pack<F, P> x, Pack<F, P> square) {
  constexpr int last_even = (n - 1) / 2 * 2, last_odd = n / 2 * 2 - 1;
  Pack<F, P> even = c[last_even], odd = c[last_odd];
#pragma GCC unroll 10
  for (int i = last_even - 2; i > 0; i -= 2) even = fma(even, square, Pack<F, P>(c[i]));
#pragma GCC unroll 10
  for (int i = last_odd - 2; i > 0; i -= 2) odd = fma(odd, square, Pack<F, P>(c[i]));
  return fma(fma(even, x, odd), x, Pack<F, P>(c[0]));
}

// Coefficients multiplied by 2^-64.
template <class F, int n> struct Lowered {
  F c[n];
  constexpr explicit Lowered(const F (&from)[n]) : c() {
    for (int i = 0; i < n; ++i) c[i] = from[i] * F(0x1p-64);
  }
};
template <class F> inline constexpr Lowered lowered_exp2(Simd<F>::exp2);

// 2^(n + r) for an integer n from Simd::lowest to 0, given as shifted = n + Simd::round_lifted. 2^(n + 64) is a normal
// number and the polynomial has the factor 2^-64, so one product rounds even a subnormal result correctly.
template <class F, int P> VMAMBA_INLINE Pack<F, P> falling_power(Pack<F, P> shifted, Pack<F, P> r) {
  using S = Simd<F>;
  const Pack<F, P> p = fma(r, polynomial(lowered_exp2<F>.c, r), Pack<F, P>(F(0x1p-64)));
  return Pack<F, P>::of([&](int i) {
    return p.v[i] * (Vector<F>)((typename S::I)shifted.v[i] << S::mantissa);
  });
}

// p · 2^n for an integer n from Simd::lowest to Simd::highest, given as shifted = n + Simd::round. It multiplies by two
// factors, because 2^n itself may not be a normal number. For NaN the factors are arbitrary, but p is NaN too.
template <class F, int P> VMAMBA_INLINE Pack<F, P> scale(Pack<F, P> p, Pack<F, P> shifted) {
  using S = Simd<F>;
  using I = typename S::I;
  return Pack<F, P>::of([&](int i) {
    const I whole = (I)shifted.v[i], half = whole >> 1;  // their last bits: n + 2·bias and ⌊n/2⌋ + bias
    return p.v[i] * (Vector<F>)(half << S::mantissa) * (Vector<F>)((whole - half) << S::mantissa);
  });
}

// a clamped to a bound; NaN stays NaN.
template <class F, int P> VMAMBA_INLINE Pack<F, P> at_least(Pack<F, P> a, F b) {
  return Pack<F, P>::of([&](int i) { return greater<F>(splat<F>(b), a.v[i]); });
}
template <class F, int P> VMAMBA_INLINE Pack<F, P> at_most(Pack<F, P> a, F b) {
  return Pack<F, P>::of([&](int i) { return lesser<F>(splat<F>(b), a.v[i]); });
}

#ifdef VMAMBA_AVX512
// In float, tables in registers shorten the polynomials:
//   2^t = 2^n · 2^(i/16) · 2^r, with t rounded to sixteenths, |r| ≤ 1/32, error 1.6e-9;
//   log(1 + u) = log(1 + r) - log(c), with c near 1 / (1 + i/31), 1 + r = c(1 + u), |r| ≤ 1/61, error 2.3e-9.
// All steps of a slow decay use the same table entry, so its rounding error would grow with their number. So a second
// table holds the relative error of float(2^(i/16)), and c is chosen so that log(c) is nearly a float.
struct Tables {
  alignas(64) float exp2[16], exp2_rest[16], c[32], minus_log_c[32];

  constexpr Tables() : exp2(), exp2_rest(), c(), minus_log_c() {
    for (int i = 0; i < 16; ++i) {
      double term = 1, sum = 0;  // of the exponential series
      for (int n = 1; n < 24; term *= i * Simd<double>::ln2 / 16 / n++) sum += term;
      exp2[i] = float(sum), exp2_rest[i] = float(sum / double(float(sum)) - 1);
    }
    c[0] = 1;
    for (int i = 1; i < 32; ++i) {
      double least = 1;
      for (int step = -64; step <= 64; ++step) {
        const float candidate = float(31.0 / (31 + i)) + float(step) * 0x1p-23f;
        const double x = (1 - double(candidate)) / (1 + double(candidate));  // -log(c) = 2 artanh(x)
        double term = x, sum = 0;
        for (int n = 1; n < 60; n += 2, term *= x * x) sum += 2 * term / n;
        const double off = sum / double(float(sum)) - 1, distance = off < 0 ? -off : off;
        if (distance < least) least = distance, c[i] = candidate, minus_log_c[i] = float(sum);
      }
    }
  }
};

inline constexpr Tables tables;

template <bool with_rest, int P> VMAMBA_INLINE Pack<float, P> exp2_by_table(Pack<float, P> t) {
  using Floats = Pack<float, P>;
  const Floats q[] = {0.69314718f, 0.24023432f, 0.05549996f};
  constexpr float sixteenths = 786432.0f;  // 1.5·2^19: adding and subtracting it rounds to sixteenths
  const Floats shifted = t + sixteenths, n = shifted - sixteenths;
  // For an infinite t, r would be NaN; max returns the bound instead, and n alone determines the result.
  const Floats r = Floats::of([&](int i) {
    return (Vector<float>)_mm512_max_ps((__m512)(t.v[i] - n.v[i]), _mm512_set1_ps(-0.0625f));
  });
  const auto look_up = [&](const float *table) {
    return Floats::of([&](int i) {
      return (Vector<float>)_mm512_permutexvar_ps((__m512i)shifted.v[i], _mm512_load_ps(table));
    });
  };
  const Floats head = look_up(tables.exp2), poly = fma(fma(r, q[2], q[1]), r, q[0]);
  Floats power;
  if constexpr (with_rest)
    power = fma(head, fma(r, poly, look_up(tables.exp2_rest)), head);
  else
    power = fma(head * r, poly, head);
  return Floats::of([&](int i) {  // times 2^⌊n⌋
    return (Vector<float>)_mm512_scalef_ps((__m512)power.v[i], (__m512)n.v[i]);
  });
}

template <int P> VMAMBA_INLINE Pack<float, P> log1p_by_table(Pack<float, P> u) {
  using Floats = Pack<float, P>;
  const Floats q[] = {-0.5f, 0.33337662f, -0.2500487f};
  const Floats shifted = fma(u, Floats(31.0f), Floats(Simd<float>::round));
  const auto look_up = [&](const float *table) {
    return Floats::of([&](int i) {
      return (Vector<float>)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)shifted.v[i],
                                                   _mm512_load_ps(table + 16));
    });
  };
  const Floats c = look_up(tables.c), r = fma(u, c, c - 1.0f);  // c - 1 is exact, and r = u where c = 1
  return fma(r * r, fma(fma(r, q[2], q[1]), r, q[0]), r) + look_up(tables.minus_log_c);
}
#endif

// 2^t, also for infinity and NaN. If t is a product, pass it through `rounded`: t is used more than once.
// `exact` is for results that are multiplied up many times, as decays are; `falling`: t is not positive.
template <bool exact, bool falling, class F, int P> VMAMBA_INLINE Pack<F, P> exp2(Pack<F, P> t) {
  using S = Simd<F>;
#ifdef VMAMBA_AVX512
  if constexpr (sizeof(F) == 4) return exp2_by_table<exact>(t);
#endif
  t = at_least(t, S::lowest);
  if constexpr (falling) {
    const Pack<F, P> shifted = t + S::round_lifted;
    return falling_power(shifted, t - (shifted - S::round_lifted));
  }
  t = at_most(t, S::highest);
  const Pack<F, P> shifted = t + S::round, r = t - (shifted - S::round);
  return scale(fma(r, polynomial(S::exp2, r), Pack<F, P>(F(1))), shifted);
}

// e^z for z ≤ 0, precise even where z·log2(e) would lose digits.
template <class F, int P> VMAMBA_INLINE Pack<F, P> exp_negative(Pack<F, P> z) {
  using S = Simd<F>;
  z = at_least(z, S::lowest * S::ln2);
  using All = Pack<F, P>;
  const All shifted = fma(z, All(S::log2e), All(S::round_lifted)), n = shifted - S::round_lifted;
  return falling_power(shifted, fma(n, All(-S::ln2_low), fma(n, All(-S::ln2_high), z)) * S::log2e);
}

// log(1 + u) for u in [0, 1], with full relative precision for small u too.
template <class F, int P> VMAMBA_INLINE Pack<F, P> log1p(Pack<F, P> u) {
  using S = Simd<F>;
#ifdef VMAMBA_AVX512
  if constexpr (sizeof(F) == 4) return log1p_by_table(u);
#endif
  const Pack<F, P> square = u * u;
  return fma(square, polynomial(S::log1p, u, square), u);
}

template <class F, int P> struct Softplus {
  Pack<F, P> value, slope;
};

// softplus(z) = max(z, 0) + log(1 + e^-|z|) and, if asked for, its derivative 1 / (1 + e^-z). With `scaled`
// t = z·log2(e), which saves the exponential its range reduction; without it t = z.
template <class F, bool scaled, bool with_slope, int P>
VMAMBA_INLINE Softplus<F, P> softplus(Pack<F, P> t) {
  using S = Simd<F>;
  using I = typename S::I;
  const auto magnitude =
      Pack<F, P>::of([&](int i) { return (Vector<F>)((I)t.v[i] | S::sign); });  // -|t|
  const Pack<F, P> u = scaled ? exp2<false, true>(magnitude) : exp_negative(magnitude);
  const Pack<F, P> linear = Pack<F, P>::of([&](int i) { return greater<F>(t.v[i], Vector<F>{}); });
  Softplus<F, P> result;
  result.value = scaled ? fma(linear, Pack<F, P>(S::ln2), log1p(u)) : linear + log1p(u);
  if constexpr (with_slope)
    result.slope = Pack<F, P>::of([&](int i) { return (I)t.v[i] < 0 ? u.v[i] : splat<F>(1); }) / (u + F(1));
  return result;
}

// The sum over the lanes of each of `lanes` vectors, as one vector. `v` is overwritten.
template <class F, int half, int... i>
VMAMBA_INLINE Vector<F> fold_pair(Vector<F> a, Vector<F> b, std::integer_sequence<int, i...>) {
  // In each group of 2·half lanes the two halves are added; the results of a come before those of b.
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
