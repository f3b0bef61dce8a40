// state_chunk_bf16_k40_v72_g3_gate_normalised
//
//   S <- e^decay S + key value^T,  out = S^T query / (z . query)
//   z <- e^decay z + key,  lse = log(z . query)
//
// A chunk of rows at a time; z, which costs little, row after row before that.
#include "memcompile/chunk.h"
#include "memcompile/kernel.h"
#include "memcompile/state.h"

namespace {

using namespace memcompile;

using T = bf16;

constexpr int KEY_DIM = 40;
constexpr int VALUE_DIM = 72;
constexpr int GROUP = 3;  // query heads that share a KV head
constexpr int HEADS = 3;  // of them, that read at once
// Of a chunk: more make scores longer, fewer move the state more often.
constexpr int ROWS = 32;
constexpr int COLUMNS = round_up(VALUE_DIM < 128 ? VALUE_DIM : 128, LANES);  // of an item, at most

using State = Chunk<T, KEY_DIM, COLUMNS, ROWS, HEADS, 1, true, false>;

int64_t head_items(const void* args) { return state_heads(args); }

void heads(const void* args, int64_t item, int64_t end) {
  const StateArgs& a = *static_cast<const StateArgs*>(args);
  for (; item < end; ++item) normalise<T, KEY_DIM, GROUP, Decay::gate>(a, item);
}

int64_t read_items(const void* args) {
  const Memory& m = static_cast<const StateArgs*>(args)->memory;
  return state_heads(args) * Columns(m, COLUMNS, VALUE_DIM).blocks;
}

// Brings what the chunk that starts at a row writes, and how it decays.
void fill(const StateArgs& a, int64_t b, int64_t h, int64_t row, int64_t column, State& state) {
  float keep[ROWS];
  for (int64_t i = 0; i < state.count; ++i) keep[i] = kept<Decay::gate>(a, b, h, row + i);
  state.decay(keep);
  for (int64_t i = 0; i < state.count; ++i) {
    const T* key = row_of<T>(a.key, b, h, row + i);
    copy_row<KEY_DIM, State::STRIDE>(key, state.key + i * State::STRIDE);
    const T* value = row_of<T>(a.value, b, h, row + i) + column;
    for (int64_t d = 0; d < state.columns; d += LANES) {
      const int some = static_cast<int>(smaller(LANES, VALUE_DIM - column - d));
      store(state.value + i * COLUMNS + d, load(value + d, some));
    }
  }
  state.pack();
}

void read(const void* args, int64_t item, int64_t end) {
  const StateArgs& a = *static_cast<const StateArgs*>(args);
  const Memory& m = a.memory;
  const Columns columns(m, COLUMNS, VALUE_DIM);
  for (; item < end; ++item) {
    const int64_t head = item / columns.blocks, column = item % columns.blocks * columns.width;
    const int64_t b = head / m.kv_heads, h = head % m.kv_heads, live = live_rows(a, b);
    const int64_t width = smaller(columns.width, VALUE_DIM - column);
    float* held = a.state + head * KEY_DIM * VALUE_DIM + column;
    float* out = a.out + head * GROUP * m.rows * VALUE_DIM + column;
    State state;
    state.begin(held, VALUE_DIM, width);
    for (int64_t row = 0; row < live; row += ROWS) {
      state.count = smaller(ROWS, live - row);
      fill(a, b, h, row, column, state);
      for (int first = 0; first < GROUP; first += HEADS) {
        float scale[ROWS * HEADS];
        for (int64_t i = 0; i < state.count; ++i) {
          for (int g = 0; g < HEADS; ++g) {
            const T* query = row_of<T>(a.query, b, h * GROUP + first + g, row + i);
            copy_row<KEY_DIM, State::STRIDE>(query, state.query + (i * HEADS + g) * State::STRIDE);
            const float lse = a.lse[(head * GROUP + first + g) * m.rows + row + i];
            scale[i * HEADS + g] = lse == -INFINITE ? 0 : expf(-lse);
          }
        }
        state.read([&](int64_t i, int64_t g, int64_t d, vec sum) __attribute__((always_inline)) {
          sum = sum * all(scale[i * HEADS + g]);
          float* to = out + ((first + g) * m.rows + row + i) * VALUE_DIM + d;
          store(to, sum, static_cast<int>(smaller(LANES, width - d)));
        });
      }
      state.write();
    }
    state.end(held, VALUE_DIM, width);
    for (int g = 0; g < GROUP; ++g) {
      for (int64_t i = live; i < m.rows; ++i) {
        memset(out + (g * m.rows + i) * VALUE_DIM, 0, width * sizeof(float));
      }
    }
  }
}

int64_t scratch_bytes(const void*) { return 0; }

constexpr Phase PHASES[] = {
    {head_items, heads},
    {read_items, read},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "state_chunk_bf16_k40_v72_g3_gate_normalised",
    scratch_bytes, PHASES);
