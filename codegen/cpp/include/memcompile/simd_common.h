// What every instruction set says in the same words.
#pragma once

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

constexpr float INFINITE = __builtin_inff();

template <class A, class B>
MEMCOMPILE_INLINE int64_t smaller(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
MEMCOMPILE_INLINE int64_t larger(A a, B b) {
  return a < b ? b : a;
}
MEMCOMPILE_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// e^x to about one ulp. Below -87 the result is 0; x is at most 88.
MEMCOMPILE_INLINE vec exp(vec x) {
  const mask tiny = less(x, all(-87.0f));
  x = max(x, all(-87.0f));
  const vec n = round(x * all(1.44269504f));
  vec r = fma(n, all(-0.693145752f), x);  // ln 2 in two parts
  r = fma(n, all(-1.42860677e-6f), r);
  vec p = all(1.0f / 720);
  p = fma(p, r, all(1.0f / 120));
  p = fma(p, r, all(1.0f / 24));
  p = fma(p, r, all(1.0f / 6));
  p = fma(p, r, all(0.5f));
  p = fma(p, r, all(1));
  p = fma(p, r, all(1));
  return select(tiny, zero(), times_power_of_two(p, n));
}

MEMCOMPILE_INLINE vec tanh(vec x) {
  // Small arguments by a series: 1 - 2 / (e^2x + 1) would cancel.
  const vec square = x * x;
  vec series = all(-17.0f / 315);
  series = fma(series, square, all(2.0f / 15));
  series = fma(series, square, all(-1.0f / 3));
  series = fma(series * square, x, x);
  const vec wide = max(min(x + x, all(40)), all(-40));
  const vec exact = all(1) - all(2) / (exp(wide) + all(1));
  return select(less(abs(x), all(0.15f)), series, exact);
}

// As load_rows, of `count` floats a row at most; the rest is 0.
template <int R>
MEMCOMPILE_INLINE vec load_rows(const float* p, int64_t stride, int64_t count) {
  constexpr int K = LANES / R;
  if (count >= K) return load_rows<R>(p, stride);
  float each[LANES] = {};
  for (int r = 0; r < R; ++r) {
    for (int k = 0; k < count; ++k) each[r * K + k] = p[r * stride + k];
  }
  return load(each);
}

// Every lane gets the sum, or the largest, of its N neighbours: lanes jN .. jN + N-1.
template <int N>
MEMCOMPILE_INLINE vec sum_by(vec a) {
  if constexpr (N > 1) a = a + swapped<1>(a);
  if constexpr (N > 2) a = a + swapped<2>(a);
  if constexpr (N > 4) a = a + swapped<4>(a);
  if constexpr (N > 8) a = a + swapped<8>(a);
  return a;
}
template <int N>
MEMCOMPILE_INLINE vec largest_by(vec a) {
  if constexpr (N > 1) a = max(a, swapped<1>(a));
  if constexpr (N > 2) a = max(a, swapped<2>(a));
  if constexpr (N > 4) a = max(a, swapped<4>(a));
  if constexpr (N > 8) a = max(a, swapped<8>(a));
  return a;
}

// Dot products of rows of T with queries that are kept as Stored.
template <class T>
struct Dot {
  using Stored = float;
  using Operand = vec;
  static constexpr int WIDTH = LANES;

  template <class E>
  MEMCOMPILE_INLINE Operand load(const E* p, int n = WIDTH) {
    return n >= WIDTH ? memcompile::load(p) : memcompile::load(p, n);
  }
  MEMCOMPILE_INLINE vec add(vec sum, Operand a, Operand b) { return fma(a, b, sum); }
};

// Weighted sums of rows of T: load() takes KEYS rows apart into PARTS operands of LANES columns.
template <class T>
struct Mix {
  using Operand = vec;
  using Weight = float;
  static constexpr int KEYS = 1;
  static constexpr int PARTS = 1;

  MEMCOMPILE_INLINE void load(const T* const* rows, int64_t at, int n, Operand (&parts)[PARTS]) {
    parts[0] = n >= LANES ? memcompile::load(rows[0] + at) : memcompile::load(rows[0] + at, n);
  }
  MEMCOMPILE_INLINE vec add(vec sum, Weight w, Operand part) { return fma(all(w), part, sum); }
  // Writes LANES weights and gives them back as they were rounded.
  MEMCOMPILE_INLINE vec pack(vec weights, Weight* to) {
    store(to, weights);
    return weights;
  }
};

// Products of matrices, DEPTH elements of both at a time: of the left one, whose rows lie DEPTH by
// DEPTH, `spread` repeats one group over all lanes; of the right one, DEPTH rows of which lie
// interleaved, `load` takes LANES columns. Elements are kept as Stored.
template <class T>
struct Outer {
  using Stored = float;
  using Operand = vec;
  static constexpr int DEPTH = 1;

  MEMCOMPILE_INLINE Operand spread(const float* p) { return all(*p); }
  MEMCOMPILE_INLINE Operand load(const float* p) { return memcompile::load(p); }
  MEMCOMPILE_INLINE vec add(vec sum, Operand a, Operand b) { return fma(a, b, sum); }
  // Interleaves LANES columns of DEPTH rows, and takes them apart.
  MEMCOMPILE_INLINE void join(const vec* rows, float* to) { store(to, rows[0]); }
  MEMCOMPILE_INLINE void part(const float* p, vec* rows) { rows[0] = memcompile::load(p); }
};

// Asks for the cache line of p into the first level, or, where p starts a line, for those that
// start at p[begin] .. p[end - 1] into the second.
template <class T>
MEMCOMPILE_INLINE void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 3);
}
template <class T>
MEMCOMPILE_INLINE void prefetch_l2(const T* p, int begin, int end) {
  constexpr int LINE = 64 / static_cast<int>(sizeof(T));
#pragma GCC unroll 4
  for (int i = (begin + LINE - 1) / LINE * LINE; i < end; i += LINE) {
    __builtin_prefetch(p + i, 0, 2);
  }
}

// Asks for memory that will be written soon: another core may hold it.
MEMCOMPILE_INLINE void prefetch_to_write(float* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(p + i, 1, 2);
}

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
