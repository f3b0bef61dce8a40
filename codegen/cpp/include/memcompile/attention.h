// One tile of attention: the rows of a band against up to TILE keys, wherever these lie.
//
// A band is R queries, R in {1, 2, 4}, worked on together. Its logits stand in vectors of R rows by
// K = LANES / R keys: lane r * K + k. What differs by row (its running maximum, say) is repeated
// over the row's K lanes.
#pragma once

#include "simd.h"

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

constexpr int TILE = 64;

// Keys and values, wherever they lie. Beyond count, up to a multiple of LANES, entries repeat the
// first one's pointers and stand at a place that no row sees.
template <class T>
struct Tile {
  int count;
  int64_t base;       // the first key's slot in the sequence
  int64_t page;       // of all keys, where tiles do not mix pages
  float place[TILE];  // slots of the keys, less base
  float bias[TILE];
  const T* key[TILE];
  const T* value[TILE];
};

// R queries times K keys: lane r * K + k is their dot product. `ahead` is told of each step: the
// columns that are multiplied.
template <class T, int DIM, int R, class Ahead>
MEMCOMPILE_INLINE vec dots(const typename Dot<T>::Stored* query, int64_t stride,
                           const T* const* key, const Ahead& ahead) {
  constexpr int K = LANES / R, WIDTH = Dot<T>::WIDTH;
  vec partial[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) partial[i] = zero();
#pragma GCC unroll 4
  for (int d = 0; d < DIM; d += WIDTH) {
    ahead(d, d + WIDTH);
    typename Dot<T>::Operand q[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) q[r] = Dot<T>::load(query + r * stride + d);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
      const auto each = Dot<T>::load(key[k] + d, DIM - d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        partial[r * K + k] = Dot<T>::add(partial[r * K + k], q[r], each);
      }
    }
  }
  return sums(partial);
}

// BLOCKS blocks of columns of out[r] = out[r] * keep[r] + sum over keys of weight[r, key] * value.
template <class T, int R, int BLOCKS, class Ahead>
MEMCOMPILE_INLINE void mix_columns(const Tile<T>& tile, const typename Mix<T>::Weight* weight,
                                   const float* keep, float* out, int64_t stride, int column,
                                   int columns, const Ahead& ahead) {
  using M = Mix<T>;
  constexpr int WIDTH = M::PARTS * LANES, PER = LANES / R / M::KEYS;
  vec sum[R][BLOCKS][M::PARTS];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < BLOCKS * M::PARTS; ++c) {
      sum[r][c / M::PARTS][c % M::PARTS] =
          load(out + r * stride + column + c * LANES) * all(keep[r]);
    }
  }
  for (int at = 0, step = 0; at < tile.count; at += M::KEYS, ++step) {
    ahead(at, column, columns);
    const auto* w = weight + step / PER * (R * PER) + step % PER;
#pragma GCC unroll 8
    for (int c = 0; c < BLOCKS; ++c) {
      typename M::Operand part[M::PARTS];
      M::load(tile.value + at, column + c * WIDTH, columns - c * WIDTH, part);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < M::PARTS; ++i) {
          sum[r][c][i] = M::add(sum[r][c][i], w[r * PER], part[i]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < BLOCKS * M::PARTS; ++c) {
      store(out + r * stride + column + c * LANES, sum[r][c / M::PARTS][c % M::PARTS]);
    }
  }
}

// out[r] = out[r] * keep[r] + sum over the tile's keys of weight[r, key] * value[key]. `ahead` is
// told of each step: the tile's key, and which columns are mixed.
template <class T, int DIM, int R, class Ahead>
MEMCOMPILE_INLINE void mix(const Tile<T>& tile, const typename Mix<T>::Weight* weight,
                           const float* keep, float* out, int64_t stride, const Ahead& ahead) {
  using M = Mix<T>;
  constexpr int WIDTH = M::PARTS * LANES;
  // As many columns at once as leave their sums in registers.
  constexpr int SUMS = (LANES == 16 ? 16 : 8) / R < 8 ? (LANES == 16 ? 16 : 8) / R : 8;
  constexpr int BLOCKS = SUMS / M::PARTS, STEP = BLOCKS * WIDTH;
  constexpr int WHOLE = DIM / STEP * STEP, REST = (DIM - WHOLE + WIDTH - 1) / WIDTH;
  if constexpr (WHOLE > 0) {
    mix_columns<T, R, BLOCKS>(tile, weight, keep, out, stride, 0, STEP, ahead);
    for (int d = STEP; d < WHOLE; d += STEP) {
      mix_columns<T, R, BLOCKS>(tile, weight, keep, out, stride, d, STEP, ahead);
    }
  }
  if constexpr (REST > 0) {
    mix_columns<T, R, REST>(tile, weight, keep, out, stride, WHOLE, DIM - WHOLE, ahead);
  }
}

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
