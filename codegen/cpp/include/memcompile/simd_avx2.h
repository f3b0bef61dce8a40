// AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

using vec = __m256;
using mask = __m256;
constexpr int LANES = 8;

MEMCOMPILE_INLINE vec zero() { return _mm256_setzero_ps(); }
MEMCOMPILE_INLINE vec all(float x) { return _mm256_set1_ps(x); }

MEMCOMPILE_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

MEMCOMPILE_INLINE vec widen(__m128i bits, bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
MEMCOMPILE_INLINE vec widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }

MEMCOMPILE_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
MEMCOMPILE_INLINE vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
template <class T>
MEMCOMPILE_INLINE vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
MEMCOMPILE_INLINE vec load(const T* p, int n) {
  if (n >= LANES) return load(p);
  T some[LANES] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}

MEMCOMPILE_INLINE __m128i narrow(vec v, f16) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MEMCOMPILE_INLINE __m128i narrow(vec v, bf16) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i sum = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i wide = _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_packus_epi32(wide, wide);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}

MEMCOMPILE_INLINE void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
MEMCOMPILE_INLINE void store(float* p, vec v, int n) { _mm256_maskstore_ps(p, first(n), v); }
template <class T>
MEMCOMPILE_INLINE void store(T* p, vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, T{}));
}
template <class T>
MEMCOMPILE_INLINE void store(T* p, vec v, int n) {
  T some[LANES];
  store(some, v);
  for (int i = 0; i < n; ++i) p[i] = some[i];
}

MEMCOMPILE_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
MEMCOMPILE_INLINE vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
MEMCOMPILE_INLINE vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
MEMCOMPILE_INLINE vec abs(vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
MEMCOMPILE_INLINE vec sqrt(vec a) { return _mm256_sqrt_ps(a); }
MEMCOMPILE_INLINE vec round(vec a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// n in -126 .. 127
MEMCOMPILE_INLINE vec times_power_of_two(vec a, vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return a * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

MEMCOMPILE_INLINE mask less(vec a, vec b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
MEMCOMPILE_INLINE mask both(mask a, mask b) { return _mm256_and_ps(a, b); }
MEMCOMPILE_INLINE vec select(mask m, vec yes, vec no) { return _mm256_blendv_ps(no, yes, m); }
MEMCOMPILE_INLINE bool any(mask m) { return _mm256_movemask_ps(m) != 0; }

// Lane i of the result is lane i ^ N of a.
template <int N>
MEMCOMPILE_INLINE vec swapped(vec a) {
  if constexpr (N == 1) return _mm256_permute_ps(a, 0xb1);
  if constexpr (N == 2) return _mm256_permute_ps(a, 0x4e);
  if constexpr (N == 4) return _mm256_permute2f128_ps(a, a, 0x01);
}

MEMCOMPILE_INLINE float sum(vec a) {
  a = a + swapped<4>(a);
  a = a + swapped<2>(a);
  return _mm256_cvtss_f32(a + swapped<1>(a));
}
MEMCOMPILE_INLINE float largest(vec a) {
  a = max(a, swapped<4>(a));
  a = max(a, swapped<2>(a));
  return _mm256_cvtss_f32(max(a, swapped<1>(a)));
}

// p[0 .. N-1], again and again: lane i is p[i % N].
template <int N>
MEMCOMPILE_INLINE vec load_repeated(const float* p) {
  if constexpr (N == 8) return _mm256_loadu_ps(p);
  if constexpr (N == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  if constexpr (N == 2) return _mm256_setr_ps(p[0], p[1], p[0], p[1], p[0], p[1], p[0], p[1]);
}

// Row r's K = LANES / R floats at p + r * stride become lanes r * K .. r * K + K - 1.
template <int R>
MEMCOMPILE_INLINE vec load_rows(const float* p, int64_t stride) {
  if constexpr (R == 1) return _mm256_loadu_ps(p);
  if constexpr (R == 2) return _mm256_set_m128(_mm_loadu_ps(p + stride), _mm_loadu_ps(p));
  if constexpr (R == 4) {
    const float *b = p + stride, *c = b + stride, *d = c + stride;
    return _mm256_setr_ps(p[0], p[1], b[0], b[1], c[0], c[1], d[0], d[1]);
  }
}

// Lane i of the result is the sum of v[i].
MEMCOMPILE_INLINE vec sums(const vec (&v)[LANES]) {
  vec four[2];  // each half: sums of four rows over that half
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const vec* r = v + 4 * i;
    const vec a = _mm256_unpacklo_ps(r[0], r[1]) + _mm256_unpackhi_ps(r[0], r[1]);
    const vec b = _mm256_unpacklo_ps(r[2], r[3]) + _mm256_unpackhi_ps(r[2], r[3]);
    const __m256d c = _mm256_castps_pd(a), d = _mm256_castps_pd(b);
    four[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(c, d)) +
              _mm256_castpd_ps(_mm256_unpackhi_pd(c, d));
  }
  return _mm256_permute2f128_ps(four[0], four[1], 0x20) +
         _mm256_permute2f128_ps(four[0], four[1], 0x31);
}

// Lane j of v[i] becomes lane i of v[j].
MEMCOMPILE_INLINE void transpose(vec (&v)[LANES]) {
  vec quads[LANES];  // 4i + j: lanes j and j+4 of rows 4i .. 4i+3
#pragma GCC unroll 2
  for (int i = 0; i < LANES; i += 4) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[i], v[i + 1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[i], v[i + 1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[i + 2], v[i + 3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[i + 2], v[i + 3]));
    quads[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    quads[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    quads[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    quads[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    v[j] = _mm256_permute2f128_ps(quads[j], quads[j + 4], 0x20);
    v[j + 4] = _mm256_permute2f128_ps(quads[j], quads[j + 4], 0x31);
  }
}

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
