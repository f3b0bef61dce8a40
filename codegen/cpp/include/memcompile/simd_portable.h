// Any machine: four lanes by the vector extension that GCC and Clang share.
#pragma once

#include <cmath>

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

using vec = float __attribute__((vector_size(16)));
using mask = int32_t __attribute__((vector_size(16)));
constexpr int LANES = 4;

MEMCOMPILE_INLINE vec all(float x) { return vec{x, x, x, x}; }
MEMCOMPILE_INLINE vec zero() { return all(0); }

MEMCOMPILE_INLINE float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
MEMCOMPILE_INLINE uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

MEMCOMPILE_INLINE float widen(float x) { return x; }
MEMCOMPILE_INLINE float widen(bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
MEMCOMPILE_INLINE float widen(f16 x) {
  // The exponent moves by 2^112; infinities and NaN keep theirs. Subnormals come out right.
  const uint32_t sign = uint32_t{x.bits} << 16 & 0x80000000u, rest = x.bits & 0x7fffu;
  const uint32_t full = rest >= 0x7c00u ? 0x7f800000u : 0;
  return from_bits(sign | full | to_bits(from_bits(rest << 13) * 0x1p112f));
}

template <class T>
MEMCOMPILE_INLINE T narrow(float x, T) {
  return x;
}
MEMCOMPILE_INLINE bf16 narrow(float x, bf16) {
  const uint32_t bits = to_bits(x);
  if (x != x) return bf16{0x7fc0};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
MEMCOMPILE_INLINE f16 narrow(float x, f16) {
  const uint32_t sign = to_bits(x) >> 16 & 0x8000u, bits = to_bits(x) & 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00;  // rounds past the largest
  } else if (bits < 0x38800000u) {
    half = to_bits(from_bits(bits) + 0.5f) - 0x3f000000u;  // subnormal: the sum rounds at 2^-24
  } else {
    half = (bits - 0x38000000u + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  return f16{static_cast<uint16_t>(sign | half)};
}

template <class T>
MEMCOMPILE_INLINE vec load(const T* p) {
  return vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
MEMCOMPILE_INLINE vec load(const T* p, int n) {
  if (n >= LANES) return load(p);
  vec v = zero();
  for (int i = 0; i < n; ++i) v[i] = widen(p[i]);
  return v;
}
template <class T>
MEMCOMPILE_INLINE void store(T* p, vec v, int n = LANES) {
  for (int i = 0; i < n; ++i) p[i] = narrow(v[i], T{});
}

MEMCOMPILE_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
MEMCOMPILE_INLINE mask less(vec a, vec b) { return a < b; }
MEMCOMPILE_INLINE mask both(mask a, mask b) { return a & b; }
MEMCOMPILE_INLINE vec select(mask m, vec yes, vec no) {
  return reinterpret_cast<vec>((m & reinterpret_cast<mask>(yes)) |
                               (~m & reinterpret_cast<mask>(no)));
}
MEMCOMPILE_INLINE bool any(mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
MEMCOMPILE_INLINE vec max(vec a, vec b) { return select(b < a, a, b); }
MEMCOMPILE_INLINE vec min(vec a, vec b) { return select(a < b, a, b); }
MEMCOMPILE_INLINE vec abs(vec a) {
  return reinterpret_cast<vec>(reinterpret_cast<mask>(a) & 0x7fffffff);
}
MEMCOMPILE_INLINE vec sqrt(vec a) {
  for (int i = 0; i < LANES; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
// |a| < 2^22
MEMCOMPILE_INLINE vec round(vec a) {
  const vec large = all(0x1.8p23f);
  return (a + large) - large;
}
// n in -126 .. 127
MEMCOMPILE_INLINE vec times_power_of_two(vec a, vec n) {
  return a * reinterpret_cast<vec>((__builtin_convertvector(n, mask) + 127) << 23);
}

// Lane i of the result is lane i ^ N of a.
template <int N>
MEMCOMPILE_INLINE vec swapped(vec a) {
  return vec{a[0 ^ N], a[1 ^ N], a[2 ^ N], a[3 ^ N]};
}

MEMCOMPILE_INLINE float sum(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
MEMCOMPILE_INLINE float largest(vec a) {
  a = max(a, swapped<2>(a));
  return max(a, swapped<1>(a))[0];
}

// p[0 .. N-1], again and again: lane i is p[i % N].
template <int N>
MEMCOMPILE_INLINE vec load_repeated(const float* p) {
  return vec{p[0], p[1 % N], p[2 % N], p[3 % N]};
}

// Row r's K = LANES / R floats at p + r * stride become lanes r * K .. r * K + K - 1.
template <int R>
MEMCOMPILE_INLINE vec load_rows(const float* p, int64_t stride) {
  constexpr int K = LANES / R;
  return vec{p[0], p[1 / K * stride + 1 % K], p[2 / K * stride + 2 % K], p[3 / K * stride + 3 % K]};
}

// Lane i of the result is the sum of v[i].
MEMCOMPILE_INLINE vec sums(const vec (&v)[LANES]) {
  return vec{sum(v[0]), sum(v[1]), sum(v[2]), sum(v[3])};
}

// Lane j of v[i] becomes lane i of v[j].
MEMCOMPILE_INLINE void transpose(vec (&v)[LANES]) {
  for (int i = 0; i < LANES; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
  }
}

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
