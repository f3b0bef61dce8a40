// Rows that read and write a state, a chunk of positions at a time.
//
// At each position a KV head's state S [KEY, columns] decays, K keys write to it, and Q queries
// read it: of what was written in the same chunk by their scores with the keys, masked and decayed,
// of what was there before by a product with S. A chunk is a few small matrix products, whose
// operands are packed once and stay in a core's own caches.
#pragma once

#include <type_traits>

#include "tiles.h"

namespace memcompile {
inline namespace MEMCOMPILE_SIMD {

constexpr int TILE_ROWS = 4;  // of a product whose sums are in registers

// sum[r][c] += rows a + r * a_stride times columns b + c * LANES, over `depth` elements.
template <class O, int N>
MEMCOMPILE_INLINE void add_product(vec (&sum)[TILE_ROWS][N], const typename O::Stored* a,
                                   int64_t a_stride, const typename O::Stored* b, int64_t b_stride,
                                   int64_t depth) {
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k += O::DEPTH) {
    typename O::Operand right[N];
#pragma GCC unroll 4
    for (int c = 0; c < N; ++c) right[c] = O::load(b + k * b_stride + c * LANES * O::DEPTH);
#pragma GCC unroll 4
    for (int r = 0; r < TILE_ROWS; ++r) {
      const auto left = O::spread(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) sum[r][c] = O::add(sum[r][c], left, right[c]);
    }
  }
}

// Elements of a row as they are kept, zeros behind them up to STRIDE.
template <int DIM, int STRIDE, class T, class E>
MEMCOMPILE_INLINE void copy_row(const T* from, E* to) {
  if constexpr (__is_same(T, E)) {
    memcpy(to, from, DIM * sizeof(E));
    memset(to + DIM, 0, (STRIDE - DIM) * sizeof(E));
  } else {
    for (int d = 0; d < DIM; d += LANES) {
      store(to + d, load(from + d, static_cast<int>(smaller(LANES, DIM - d))));
    }
    for (int d = round_up(DIM, LANES); d < STRIDE; d += LANES) store(to + d, zero());
  }
}

// One chunk of POSITIONS, and the state before it. What is read is rounded to T where T has products
// of its own. Where inputs are written as they are, so is what is written, and nothing is lost;
// where they are scaled (EXACT), it stays in float32. DELTA: a key writes what its value differs by
// from what the state holds for it. Unless all positions are live, rows behind the last are zeros.
template <class T, int KEY, int COLUMNS, int POSITIONS, int Q, int K, bool EXACT, bool DELTA>
struct Chunk {
  using Read = Outer<T>;
  using Write = Outer<std::conditional_t<EXACT, float, T>>;
  using Stored = typename Read::Stored;
  using Written = typename Write::Stored;
  static constexpr int DEPTH = Read::DEPTH;
  static constexpr bool PAIRS = DEPTH > 1;
  static constexpr int QUERIES = POSITIONS * Q, KEYS = POSITIONS * K;
  static constexpr int STRIDE = round_up(KEY, DEPTH * LANES);  // of queries and keys
  static constexpr int ROWS = round_up(KEY, TILE_ROWS);        // of the state
  static_assert(KEYS % LANES == 0 && QUERIES % TILE_ROWS == 0 && COLUMNS % LANES == 0);
  static_assert(!DELTA || (K == 1 && EXACT));

  int64_t count;    // live positions
  int64_t columns;  // of the state
  alignas(64) float since[POSITIONS];         // what is left, at each position, of the state before
  alignas(64) float reach[POSITIONS * KEYS];  // and of each key: 0 of later ones
  alignas(64) float beta[DELTA ? POSITIONS : 1];
  alignas(64) Stored query[QUERIES * STRIDE];
  alignas(64) Stored key[KEYS * STRIDE];
  alignas(64) float exact_key[DELTA && PAIRS ? KEYS * STRIDE : LANES];
  alignas(64) Stored key_columns[STRIDE * KEYS];  // interleaved
  alignas(64) Written key_rows[ROWS * KEYS];      // transposed; as much as is left at the end
  alignas(64) float value[KEYS * COLUMNS];        // what keys write
  alignas(64) Stored value_pairs[PAIRS ? KEYS * COLUMNS : LANES];
  alignas(64) float state[ROWS * COLUMNS];
  alignas(64) Stored state_pairs[PAIRS ? STRIDE * COLUMNS : LANES];
  alignas(64) Stored scores[QUERIES * KEYS];
  alignas(64) float lower[DELTA ? KEYS * KEYS : LANES];

  // The state of `width` columns before the first chunk, zeros without one.
  void begin(const float* from, int64_t stride, int64_t width) {
    columns = divide_up(width, LANES) * LANES;
    for (int f = 0; f < ROWS; ++f) {
      for (int64_t d = 0; d < columns; d += LANES) {
        const int some = static_cast<int>(smaller(LANES, width - d));
        store(state + f * COLUMNS + d, from && f < KEY ? load(from + f * stride + d, some) : zero());
      }
    }
    if constexpr (PAIRS) {
      for (int f = 0; f < ROWS; f += DEPTH) {
        for (int64_t d = 0; d < columns; d += LANES) {
          const vec rows[] = {load(state + f * COLUMNS + d), load(state + (f + 1) * COLUMNS + d)};
          Read::join(rows, state_pairs + f * COLUMNS + d * DEPTH);
        }
      }
    }
  }

  void end(float* to, int64_t stride, int64_t width) const {
    for (int f = 0; f < KEY; ++f) {
      for (int64_t d = 0; d < width; d += LANES) {
        const int some = static_cast<int>(smaller(LANES, width - d));
        store(to + f * stride + d, load(state + f * COLUMNS + d), some);
      }
    }
  }

  // keep[i]: what the decay at position i leaves. Products of these, not exponentials of differences
  // of sums: a decay to nothing is exact.
  void decay(const float* keep) {
    float left = 1;
    for (int i = 0; i < POSITIONS; ++i) {
      const float now = i < count ? keep[i] : 1;
      float* row = reach + i * KEYS;
      for (int j = 0; j < KEYS; j += LANES) {
        store(row + j, i ? load(row - KEYS + j) * all(now) : zero());
      }
      for (int k = 0; k < K; ++k) row[i * K + k] = i < count;
      since[i] = left *= now;
    }
  }

  // After query, key and value were filled at the live positions, key and value:
  void pack() {
    for (int64_t j = count * K; j < KEYS; ++j) {
      for (int d = 0; d < STRIDE; d += LANES) store(key + j * STRIDE + d, zero());
      for (int64_t d = 0; d < columns; d += LANES) store(value + j * COLUMNS + d, zero());
    }
    for (int j = 0; j < KEYS; j += LANES) {
      for (int d = 0; d < STRIDE; d += LANES * DEPTH) {
        vec words[LANES];
        for (int i = 0; i < LANES; ++i) {
          words[i] = load(reinterpret_cast<const float*>(key + (j + i) * STRIDE + d));
        }
        transpose(words);
        for (int i = 0; i < LANES; ++i) {
          Stored* to = key_columns + (d + i * DEPTH) * KEYS + j * DEPTH;
          store(reinterpret_cast<float*>(to), words[i]);
        }
      }
    }
    const float* last = reach + (POSITIONS - 1) * KEYS;
    for (int f = 0; f < ROWS; f += DEPTH) {
      for (int j = 0; j < KEYS; j += LANES) {
        vec rows[DEPTH];
        Read::part(key_columns + f * KEYS + j * DEPTH, rows);
        for (int d = 0; d < DEPTH; ++d) {
          store(key_rows + (f + d) * KEYS + j, EXACT ? rows[d] * load(last + j) : rows[d]);
        }
      }
    }
    if constexpr (DELTA) solve();
    if constexpr (PAIRS) {
      for (int j = 0; j < KEYS; j += DEPTH) {
        for (int64_t d = 0; d < columns; d += LANES) {
          const vec rows[] = {load(value + j * COLUMNS + d), load(value + (j + 1) * COLUMNS + d)};
          Read::join(rows, value_pairs + j * COLUMNS + d * DEPTH);
        }
      }
    }
  }

  // Turns values into what the delta rule writes, row after row: u_i = beta_i (v_i - since_i S^T k_i
  // - sum over j < i of reach_ij (k_i . k_j) u_j).
  void solve() {
    using Float = Outer<float>;
    const int64_t rows = round_up(static_cast<int>(count), TILE_ROWS);
    const float* keys;
    if constexpr (PAIRS) {
      for (int64_t i = 0; i < rows * STRIDE; i += LANES) store(exact_key + i, load(key + i));
      keys = exact_key;
    } else {
      keys = key;
    }
    for (int64_t i = count; i < rows; ++i) beta[i] = 0;
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
      each_tile(row + TILE_ROWS, [&](int64_t at, auto n) __attribute__((always_inline)) {
        constexpr int N = decltype(n)::value;
        vec sum[TILE_ROWS][N] = {};
        add_product<Read>(sum, key + row * STRIDE, STRIDE, key_columns + at * DEPTH, KEYS, KEY);
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int c = 0; c < N; ++c) {
            const int64_t to = (row + r) * KEYS + at + c * LANES;
            store(lower + to, sum[r][c] * load(reach + to) * all(-beta[row + r]));
          }
        }
      });
    }
    each_tile(columns, [&](int64_t at, auto n) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        vec sum[TILE_ROWS][N] = {};
        add_product<Float>(sum, keys + row * STRIDE, STRIDE, state + at, COLUMNS, KEY);
        float* to = value + row * COLUMNS + at;
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int c = 0; c < N; ++c) {
            const vec held = all(since[row + r]) * sum[r][c];
            sum[r][c] = all(beta[row + r]) * (load(to + r * COLUMNS + c * LANES) - held);
          }
        }
        add_product<Float>(sum, lower + row * KEYS, KEYS, value + at, COLUMNS, row);
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int c = 0; c < N; ++c) {
            for (int s = 0; s < r; ++s) {
              sum[r][c] = fma(all(lower[(row + r) * KEYS + row + s]), sum[s][c], sum[r][c]);
            }
            store(to + r * COLUMNS + c * LANES, sum[r][c]);
          }
        }
      }
    });
  }

  // Calls emit(position, q, column, vector) with the sums that each live position's queries read.
  template <class Emit>
  void read(const Emit& emit) {
    const int64_t live = count * Q, rows = divide_up(live, TILE_ROWS) * TILE_ROWS;
    for (int64_t row = live; row < rows; ++row) {
      for (int d = 0; d < STRIDE; d += LANES) store(query + row * STRIDE + d, zero());
    }
    // Keys up to the last position of a tile are seen by some of its rows.
    const auto seen = [&](int64_t row) { return ((row + TILE_ROWS - 1) / Q + 1) * K; };
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
      each_tile(seen(row), [&](int64_t at, auto n) __attribute__((always_inline)) {
        constexpr int N = decltype(n)::value;
        vec sum[TILE_ROWS][N] = {};
        add_product<Read>(sum, query + row * STRIDE, STRIDE, key_columns + at * DEPTH, KEYS, KEY);
        for (int r = 0; r < TILE_ROWS; ++r) {
          const float* left = reach + (row + r) / Q * KEYS + at;
          for (int c = 0; c < N; ++c) {
            store(scores + (row + r) * KEYS + at + c * LANES, sum[r][c] * load(left + c * LANES));
          }
        }
      });
    }
    const Stored *held, *values;
    if constexpr (PAIRS) {
      held = state_pairs, values = value_pairs;
    } else {
      held = state, values = value;
    }
    each_tile(columns, [&](int64_t at, auto n) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        vec sum[TILE_ROWS][N] = {};
        add_product<Read>(sum, query + row * STRIDE, STRIDE, held + at * DEPTH, COLUMNS, KEY);
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int c = 0; c < N; ++c) sum[r][c] = sum[r][c] * all(since[(row + r) / Q]);
        }
        add_product<Read>(sum, scores + row * KEYS, KEYS, values + at * DEPTH, COLUMNS, seen(row));
        for (int r = 0; r < smaller(TILE_ROWS, live - row); ++r) {
          for (int c = 0; c < N; ++c) {
            emit((row + r) / Q, (row + r) % Q, at + c * LANES, sum[r][c]);
          }
        }
      }
    });
  }

  // Moves the state behind the chunk.
  void write() {
    const typename Write::Stored* values;
    if constexpr (__is_same(Written, float)) {
      values = value;
    } else {
      values = value_pairs;
    }
    const vec left = all(since[POSITIONS - 1]);
    each_tile(columns, [&](int64_t at, auto n) __attribute__((always_inline)) {
      constexpr int N = decltype(n)::value;
      for (int f = 0; f < ROWS; f += TILE_ROWS) {
        vec sum[TILE_ROWS][N];
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int c = 0; c < N; ++c) {
            sum[r][c] = load(state + (f + r) * COLUMNS + at + c * LANES) * left;
          }
        }
        add_product<Write>(sum, key_rows + f * KEYS, KEYS, values + at * Write::DEPTH, COLUMNS,
                           count * K);
        for (int r = 0; r < TILE_ROWS; ++r) {
          for (int c = 0; c < N; ++c) {
            store(state + (f + r) * COLUMNS + at + c * LANES, sum[r][c]);
          }
        }
        if constexpr (PAIRS) {
          for (int r = 0; r < TILE_ROWS; r += DEPTH) {
            for (int c = 0; c < N; ++c) {
              const vec rows[] = {sum[r][c], sum[r + 1][c]};
              Read::join(rows, state_pairs + (f + r) * COLUMNS + (at + c * LANES) * DEPTH);
            }
          }
        }
      }
    });
  }
};

}  // inline namespace MEMCOMPILE_SIMD
}  // namespace memcompile
