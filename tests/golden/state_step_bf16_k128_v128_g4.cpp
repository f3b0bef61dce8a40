// state_step_bf16_k128_v128_g4
//
//   S <- S + key value^T,  out = S^T query
//
// Row after row, a tile of S's columns at a time: between rows the tile stays in a core's own
// caches, so memory is read and written once. A feature's row is read by all query heads while it
// is in registers.
#include "memcompile/kernel.h"
#include "memcompile/state.h"
#include "memcompile/tiles.h"

namespace {

using namespace memcompile;

using T = bf16;

constexpr int KEY_DIM = 128;
constexpr int VALUE_DIM = 128;
constexpr int GROUP = 4;  // query heads that share a KV head

// What one row of tokens brings, in floats.
struct Row {
  float left;  // of the state before
  alignas(64) float key[round_up(KEY_DIM, LANES)];
  alignas(64) float query[GROUP][round_up(KEY_DIM, LANES)];
};

void fill(const StateArgs& a, int64_t b, int64_t h, int64_t i, Row& row) {
  row.left = kept<Decay::none>(a, b, h, i);
  const T* key = row_of<T>(a.key, b, h, i);
  for (int f = 0; f < KEY_DIM; f += LANES) {
    store(row.key + f, load(key + f, static_cast<int>(smaller(LANES, KEY_DIM - f))));
  }
  for (int g = 0; g < GROUP; ++g) {
    const T* query = row_of<T>(a.query, b, h * GROUP + g, i);
    for (int f = 0; f < KEY_DIM; f += LANES) {
      store(row.query[g] + f, load(query + f, static_cast<int>(smaller(LANES, KEY_DIM - f))));
    }
  }
}

// N vectors at p, of which some may lie beyond the last column.
template <int N, class E>
MEMCOMPILE_INLINE void load_tile(const E* p, int64_t columns, vec (&to)[N]) {
#pragma GCC unroll 4
  for (int c = 0; c < N; ++c) {
    const int some = static_cast<int>(smaller(LANES, columns - c * LANES));
    to[c] = VALUE_DIM % LANES ? load(p + c * LANES, some) : load(p + c * LANES);
  }
}

template <int N>
MEMCOMPILE_INLINE void store_tile(float* p, int64_t columns, const vec (&from)[N]) {
#pragma GCC unroll 4
  for (int c = 0; c < N; ++c) {
    const int some = static_cast<int>(smaller(LANES, columns - c * LANES));
    if constexpr (VALUE_DIM % LANES) {
      store(p + c * LANES, from[c], some);
    } else {
      store(p + c * LANES, from[c]);
    }
  }
}

// Reads a tile for H heads from the first on; before that, WRITE adds what the row writes.
template <int H, bool WRITE, int N>
MEMCOMPILE_INLINE void pass(const Row& row, int first, const vec (&write)[N], float* tile,
                            int64_t columns, float* out, int64_t out_stride) {
  vec sum[H][N] = {};
  for (int f = 0; f < KEY_DIM; ++f, tile += VALUE_DIM) {
    vec state[N];
    load_tile<N>(tile, columns, state);
    if constexpr (WRITE) {
      const vec key = all(row.key[f]);
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) state[c] = fma(key, write[c], state[c]);
      store_tile<N>(tile, columns, state);
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      const vec query = all(row.query[first + h][f]);
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) sum[h][c] = fma(query, state[c], sum[h][c]);
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) {
    store_tile<N>(out + (first + h) * out_stride, columns, sum[h]);
  }
}

// One row of tokens on a tile of the state: out is that of the group's first head.
template <int N>
MEMCOMPILE_INLINE void step(const Row& row, const T* value, float* tile, int64_t columns,
                            float* out, int64_t out_stride) {
  vec write[N];
  load_tile<N>(value, columns, write);
  pass<4, true>(row, 0, write, tile, columns, out, out_stride);
}

int64_t read_items(const void* args) {
  const Memory& m = static_cast<const StateArgs*>(args)->memory;
  return state_heads(args) * Columns(m, VALUE_DIM, VALUE_DIM).blocks;
}

void read(const void* args, int64_t item, int64_t end) {
  const StateArgs& a = *static_cast<const StateArgs*>(args);
  const Memory& m = a.memory;
  const Columns columns(m, VALUE_DIM, VALUE_DIM);
  Row row;
  for (; item < end; ++item) {
    const int64_t head = item / columns.blocks, column = item % columns.blocks * columns.width;
    const int64_t b = head / m.kv_heads, h = head % m.kv_heads, live = live_rows(a, b);
    const int64_t width = smaller(columns.width, VALUE_DIM - column), stride = m.rows * VALUE_DIM;
    float* state = a.state + head * KEY_DIM * VALUE_DIM + column;
    float* out = a.out + head * GROUP * stride + column;
    if (column == 0) mark<GROUP>(a, head);
    each_tile(width, [&](int64_t at, auto n) __attribute__((always_inline)) {
      for (int64_t i = 0; i < live; ++i) {
        if (at == 0 || live > 1) fill(a, b, h, i, row);
        const T* value = row_of<T>(a.value, b, h, i) + column + at;
        float* to = out + i * VALUE_DIM + at;
        step<decltype(n)::value>(row, value, state + at, width - at, to, stride);
      }
    });
    for (int g = 0; g < GROUP; ++g) {
      for (int64_t i = live; i < m.rows; ++i) {
        memset(out + g * stride + i * VALUE_DIM, 0, width * sizeof(float));
      }
    }
  }
}

int64_t scratch_bytes(const void*) { return 0; }

constexpr Phase PHASES[] = {
    {read_items, read},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "state_step_bf16_k128_v128_g4",
    scratch_bytes, PHASES);
