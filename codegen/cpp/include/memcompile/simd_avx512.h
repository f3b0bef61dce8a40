// AVX-512 (F, BW, DQ, VL) with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

using vec = __m512;
using mask = __mmask16;
constexpr int LANES = 16;

MEMCOMPILE_INLINE vec zero() { return _mm512_setzero_ps(); }
MEMCOMPILE_INLINE vec all(float x) { return _mm512_set1_ps(x); }

MEMCOMPILE_INLINE mask first(int n) { return static_cast<mask>((1u << n) - 1); }

MEMCOMPILE_INLINE vec widen(__m256i bits, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
MEMCOMPILE_INLINE vec widen(__m256i bits, f16) { return _mm512_cvtph_ps(bits); }

MEMCOMPILE_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
MEMCOMPILE_INLINE vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
template <class T>
MEMCOMPILE_INLINE vec load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
MEMCOMPILE_INLINE vec load(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}

MEMCOMPILE_INLINE __m256i narrow(vec v, f16) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MEMCOMPILE_INLINE __m256i narrow(vec v, bf16) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
#else
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i sum = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const mask nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}

MEMCOMPILE_INLINE void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
MEMCOMPILE_INLINE void store(float* p, vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }
template <class T>
MEMCOMPILE_INLINE void store(T* p, vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, T{}));
}
template <class T>
MEMCOMPILE_INLINE void store(T* p, vec v, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(v, T{}));
}

MEMCOMPILE_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
MEMCOMPILE_INLINE vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
MEMCOMPILE_INLINE vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
MEMCOMPILE_INLINE vec abs(vec a) { return _mm512_abs_ps(a); }
MEMCOMPILE_INLINE vec sqrt(vec a) { return _mm512_sqrt_ps(a); }
MEMCOMPILE_INLINE vec round(vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MEMCOMPILE_INLINE vec times_power_of_two(vec a, vec n) { return _mm512_scalef_ps(a, n); }

MEMCOMPILE_INLINE mask less(vec a, vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
MEMCOMPILE_INLINE mask both(mask a, mask b) { return a & b; }
MEMCOMPILE_INLINE vec select(mask m, vec yes, vec no) { return _mm512_mask_blend_ps(m, no, yes); }
MEMCOMPILE_INLINE bool any(mask m) { return m != 0; }

MEMCOMPILE_INLINE float sum(vec a) { return _mm512_reduce_add_ps(a); }
MEMCOMPILE_INLINE float largest(vec a) { return _mm512_reduce_max_ps(a); }

// Lane i of the result is lane i ^ N of a.
template <int N>
MEMCOMPILE_INLINE vec swapped(vec a) {
  if constexpr (N == 1) return _mm512_permute_ps(a, 0xb1);
  if constexpr (N == 2) return _mm512_permute_ps(a, 0x4e);
  if constexpr (N == 4) return _mm512_shuffle_f32x4(a, a, 0xb1);
  if constexpr (N == 8) return _mm512_shuffle_f32x4(a, a, 0x4e);
}

// p[0 .. N-1], again and again: lane i is p[i % N].
template <int N>
MEMCOMPILE_INLINE vec load_repeated(const float* p) {
  if constexpr (N == 16) return _mm512_loadu_ps(p);
  if constexpr (N == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  if constexpr (N == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
}

// Row r's K = LANES / R floats at p + r * stride become lanes r * K .. r * K + K - 1.
template <int R>
MEMCOMPILE_INLINE vec load_rows(const float* p, int64_t stride) {
  if constexpr (R == 1) return _mm512_loadu_ps(p);
  if constexpr (R == 2) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)),
                              _mm256_loadu_ps(p + stride), 1);
  }
  if constexpr (R == 4) {
    const auto row = [&](int r) __attribute__((always_inline)) { return _mm_loadu_ps(p + r * stride); };
    vec rows = _mm512_castps128_ps512(row(0));
    rows = _mm512_insertf32x4(rows, row(1), 1);
    rows = _mm512_insertf32x4(rows, row(2), 2);
    return _mm512_insertf32x4(rows, row(3), 3);
  }
}

// Lane i of the result is the sum of v[i].
MEMCOMPILE_INLINE vec sums(const vec (&v)[LANES]) {
  vec four[4];  // lanes 4j .. 4j+3: sums of four rows over the j-th quarter
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const vec* r = v + 4 * i;
    const vec a = _mm512_unpacklo_ps(r[0], r[1]) + _mm512_unpackhi_ps(r[0], r[1]);
    const vec b = _mm512_unpacklo_ps(r[2], r[3]) + _mm512_unpackhi_ps(r[2], r[3]);
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    four[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)) +
              _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  const vec low = _mm512_shuffle_f32x4(four[0], four[1], 0x44) +
                  _mm512_shuffle_f32x4(four[0], four[1], 0xee);
  const vec high = _mm512_shuffle_f32x4(four[2], four[3], 0x44) +
                   _mm512_shuffle_f32x4(four[2], four[3], 0xee);
  return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xdd);
}

// Lane j of v[i] becomes lane i of v[j].
MEMCOMPILE_INLINE void transpose(vec (&v)[LANES]) {
  vec quads[LANES];  // 4i + j: lanes j, j+4, j+8, j+12 of rows 4i .. 4i+3
#pragma GCC unroll 4
  for (int i = 0; i < LANES; i += 4) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[i], v[i + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[i], v[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2], v[i + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2], v[i + 3]));
    quads[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    quads[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    quads[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    quads[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vec a = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0x44);
    const vec b = _mm512_shuffle_f32x4(quads[j], quads[j + 4], 0xee);
    const vec c = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0x44);
    const vec d = _mm512_shuffle_f32x4(quads[j + 8], quads[j + 12], 0xee);
    v[j] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[j + 4] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[j + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[j + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
