// Columns of a matrix, as many at a time as stay in registers.
#pragma once

#include "simd.h"

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2;

constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }

// Calls f with each tile's first column and its number of vectors, the last of which may reach beyond
// the last column.
template <int N>
struct Vectors {
  static constexpr int value = N;
};
template <class F>
MEMCOMPILE_INLINE void each_tile(int64_t columns, const F& f) {
  int64_t at = 0;
  for (; at + (TILE_VECTORS - 1) * LANES < columns; at += TILE_VECTORS * LANES) {
    f(at, Vectors<TILE_VECTORS>{});
  }
  if constexpr (TILE_VECTORS > 2) {
    if (at + LANES < columns) f(at, Vectors<2>{}), at += 2 * LANES;
  }
  if (at < columns) f(at, Vectors<1>{});
}

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
