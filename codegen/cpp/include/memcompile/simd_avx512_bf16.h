// bfloat16 pairs multiplied and summed in one instruction: products are exact in float32.
#pragma once

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

template <>
struct Dot<bf16> {
  using Stored = bf16;
  using Operand = __m512bh;
  static constexpr int WIDTH = 32;

  MEMCOMPILE_INLINE Operand load(const bf16* p, int n = WIDTH) {
    if (n >= WIDTH) return reinterpret_cast<Operand>(_mm512_loadu_si512(p));
    return reinterpret_cast<Operand>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
  }
  MEMCOMPILE_INLINE vec add(vec sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }
};

// Pairs of elements, a pair of rows at once.
template <>
struct Outer<bf16> {
  using Stored = bf16;
  using Operand = __m512bh;
  static constexpr int DEPTH = 2;

  MEMCOMPILE_INLINE Operand spread(const bf16* p) {
    int pair;
    memcpy(&pair, p, 4);
    return reinterpret_cast<Operand>(_mm512_set1_epi32(pair));
  }
  MEMCOMPILE_INLINE Operand load(const bf16* p) {
    return reinterpret_cast<Operand>(_mm512_loadu_si512(p));
  }
  MEMCOMPILE_INLINE vec add(vec sum, Operand a, Operand b) { return _mm512_dpbf16_ps(sum, a, b); }
  MEMCOMPILE_INLINE void join(const vec* rows, bf16* to) {
    const __m512i low = _mm512_cvtepu16_epi32(narrow(rows[0], bf16{}));
    const __m512i high = _mm512_cvtepu16_epi32(narrow(rows[1], bf16{}));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  MEMCOMPILE_INLINE void part(const bf16* p, vec* rows) {
    const __m512i pairs = _mm512_loadu_si512(p), upper = _mm512_set1_epi32(0xffff0000);
    rows[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    rows[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
  }
};

// Two rows at once: their elements are interleaved, and a weight is the pair of both rows'.
template <>
struct Mix<bf16> {
  using Operand = __m512bh;
  using Weight = uint32_t;
  static constexpr int KEYS = 2;
  static constexpr int PARTS = 2;

  MEMCOMPILE_INLINE void load(const bf16* const* rows, int64_t at, int n, Operand (&parts)[PARTS]) {
    const uint32_t some = n >= 32 ? 0xffffffffu : (1u << n) - 1;
    const __m512i a = _mm512_maskz_loadu_epi16(some, rows[0] + at);
    const __m512i b = _mm512_maskz_loadu_epi16(some, rows[1] + at);
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    parts[0] = reinterpret_cast<Operand>(_mm512_permutex2var_epi16(a, low, b));
    parts[1] = reinterpret_cast<Operand>(_mm512_permutex2var_epi16(a, high, b));
  }
  MEMCOMPILE_INLINE vec add(vec sum, Weight w, Operand part) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<Operand>(_mm512_set1_epi32(w)), part);
  }
  // Writes LANES weights as LANES / KEYS pairs and gives them back as they were rounded.
  MEMCOMPILE_INLINE vec pack(vec weights, Weight* to) {
    const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(weights));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
    return widen(narrow, bf16{});
  }
};

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
