// What every kernel of a fixed-size state reads, and the normaliser beside it.
#pragma once

#include <math.h>

#include "kernel.h"
#include "simd.h"

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

enum class Decay { none, constant, gate };

// What the decay at a row leaves of a KV head's state.
template <Decay D>
MEMCOMPILE_INLINE float kept(const StateArgs& a, int64_t sequence, int64_t kv_head, int64_t row) {
  if constexpr (D == Decay::none) return 1;
  if constexpr (D == Decay::constant) return expf(a.decay[kv_head]);
  return expf(a.decay[(sequence * a.memory.kv_heads + kv_head) * a.memory.rows + row]);
}

MEMCOMPILE_INLINE int64_t live_rows(const StateArgs& a, int64_t sequence) {
  return larger(0, smaller(a.memory.lengths[sequence], a.memory.rows));
}

template <class T>
MEMCOMPILE_INLINE const T* row_of(const Rows& rows, int64_t sequence, int64_t head, int64_t row) {
  return static_cast<const T*>(rows.data) + sequence * rows.batch_stride + head * rows.head_stride +
         row * rows.row_stride;
}

// The normaliser z of one (sequence, KV head), row after row: lse = log(z . query). What reads the
// state afterwards divides by e^lse.
template <class T, int KEY, int GROUP, Decay D>
void normalise(const StateArgs& a, int64_t item) {
  const Memory& m = a.memory;
  const int64_t b = item / m.kv_heads, h = item % m.kv_heads, live = live_rows(a, b);
  float* lse = a.lse + item * GROUP * m.rows;
  constexpr int WIDTH = (KEY + LANES - 1) / LANES * LANES;
  alignas(64) float norm[WIDTH];
  for (int d = 0; d < KEY; d += LANES) {
    store(norm + d, load(a.norm + item * KEY + d, static_cast<int>(smaller(LANES, KEY - d))));
  }
  for (int64_t i = 0; i < live; ++i) {
    const T* key = row_of<T>(a.key, b, h, i);
    const vec left = all(kept<D>(a, b, h, i));
    for (int d = 0; d < KEY; d += LANES) {
      const vec more = load(key + d, static_cast<int>(smaller(LANES, KEY - d)));
      store(norm + d, fma(load(norm + d), left, more));
    }
    for (int g = 0; g < GROUP; ++g) {
      const T* query = row_of<T>(a.query, b, h * GROUP + g, i);
      vec total = zero();
      for (int d = 0; d < KEY; d += LANES) {
        const vec each = load(query + d, static_cast<int>(smaller(LANES, KEY - d)));
        total = fma(load(norm + d), each, total);
      }
      const float den = sum(total);
      lse[g * m.rows + i] = den > 0 ? logf(den) : -INFINITE;
    }
  }
  for (int d = 0; d < KEY; d += LANES) {
    const int some = static_cast<int>(smaller(LANES, KEY - d));
    store(a.norm + item * KEY + d, load(norm + d), some);
  }
  for (int g = 0; g < GROUP; ++g) {
    for (int64_t i = live; i < m.rows; ++i) lse[g * m.rows + i] = -INFINITE;
  }
}

// What a row of an un-normalised state has for a log-sum-exp.
template <int GROUP>
void mark(const StateArgs& a, int64_t item) {
  const Memory& m = a.memory;
  const int64_t live = live_rows(a, item / m.kv_heads);
  for (int g = 0; g < GROUP; ++g) {
    float* lse = a.lse + (item * GROUP + g) * m.rows;
    for (int64_t i = 0; i < m.rows; ++i) lse[i] = i < live ? 0 : -INFINITE;
  }
}

MEMCOMPILE_INLINE int64_t state_heads(const void* args) {
  const Memory& m = static_cast<const StateArgs*>(args)->memory;
  return m.batch * m.kv_heads;
}

// Columns of a state do not know of each other: where (sequence, KV head) pairs are fewer than
// threads, blocks of columns are items of their own.
struct Columns {
  int64_t width;
  int64_t blocks;

  Columns(const Memory& m, int64_t most, int64_t columns) : width(most) {
    const int64_t heads = m.batch * m.kv_heads;
    while (width > 32 && heads * divide_up(columns, width) < m.threads) {
      width = divide_up(width / 2, LANES) * LANES;
    }
    blocks = divide_up(columns, width);
  }
};

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
