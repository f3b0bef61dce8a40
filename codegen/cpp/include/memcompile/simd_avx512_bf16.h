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
