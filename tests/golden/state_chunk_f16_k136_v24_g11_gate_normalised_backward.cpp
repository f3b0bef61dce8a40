// state_chunk_f16_k136_v24_g11_gate_normalised_backward
//
// Gradients of what state_chunk reads, from those of S^T query and z . query. With left[i, j] what
// the decays after row j leave at row i:
//   query[i] = sum over j <= i of left[i, j] (grad[i] . value[j]) key[j]
//   key[j]   = sum over i >= j of left[i, j] (value[j] . grad[i]) query[i]
//   value[j] = sum over i >= j of left[i, j] (key[j] . query[i]) grad[i]
// Each is itself a read through a state, the last two from the last row to the first, where what is
// written are the rows of all query heads of the group.
// z is one more column of S: a value has a one behind it, a gradient that of z . query.
// A decay's logarithm is in left[i, j] of all rows on both sides of it: its gradient is the sum,
// from its row on, of query . grad_query - key . grad_key. The first decays nothing.
//
// Everything is float32, whatever the inputs are.
#include "memcompile/chunk.h"
#include "memcompile/kernel.h"
#include "memcompile/state.h"

namespace {

using namespace memcompile;

using T = f16;

constexpr int KEY_DIM = 136;
constexpr int VALUE_DIM = 24;
constexpr int GROUP = 11;  // query heads that share a KV head
constexpr int ROWS = 16;  // of a chunk
constexpr int KEY_COLUMNS = round_up(KEY_DIM < 128 ? KEY_DIM : 128, LANES);  // of an item, at most
constexpr int VALUE_COLUMNS = round_up(VALUE_DIM < 128 ? VALUE_DIM : 128, LANES);

using ForQuery = Chunk<float, VALUE_DIM + 1, KEY_COLUMNS, ROWS, GROUP, 1, true, false>;
using ForKey = Chunk<float, VALUE_DIM + 1, KEY_COLUMNS, ROWS, 1, GROUP, true, false>;
using ForValue = Chunk<float, KEY_DIM, VALUE_COLUMNS, ROWS, 1, GROUP, true, false>;

// What one item reads: the rows of a (sequence, KV head).
struct Head {
  const StateArgs& a;
  int64_t b, h, live;

  float decay(int64_t row) const { return kept<Decay::gate>(a, b, h, row); }
  const T* query(int64_t row, int64_t g) const {
    return row_of<T>(a.query, b, h * GROUP + g, row);
  }
  const T* key(int64_t row) const { return row_of<T>(a.key, b, h, row); }
  const T* value(int64_t row) const { return row_of<T>(a.value, b, h, row); }
  const float* grad(int64_t row, int64_t g) const {
    return row_of<float>(a.grad_num, b, h * GROUP + g, row);
  }
  float grad_den(int64_t row, int64_t g) const {
    return a.grad_den[((b * a.memory.kv_heads + h) * GROUP + g) * a.memory.rows + row];
  }
};

template <int STRIDE>
void copy_grad(const Head& head, int64_t row, int64_t g, float* to) {
  copy_row<VALUE_DIM, STRIDE>(head.grad(row, g), to);
  to[VALUE_DIM] = head.grad_den(row, g);
}

template <int STRIDE>
void copy_value(const Head& head, int64_t row, float* to) {
  copy_row<VALUE_DIM, STRIDE>(head.value(row), to);
  to[VALUE_DIM] = 1;
}

template <class E>
void copy_columns(const E* from, int64_t width, float* to) {
  for (int64_t d = 0; d < width; d += LANES) {
    store(to + d, load(from + d, static_cast<int>(smaller(LANES, width - d))));
  }
}

// Reads a state that starts empty, from the first row to the last or, BACK, from the last to the
// first, where a row's decay comes between it and the row before. fill(state, i, row) brings the
// chunk's i-th row; results go to out [queries of a row, n, stride].
template <bool BACK, class State, class Fill>
void sweep(const Head& head, int64_t width, float* out, int64_t stride, const Fill& fill) {
  State state;
  state.begin(nullptr, 0, width);
  const int64_t rows = head.a.memory.rows, live = head.live;
  for (int64_t start = 0; start < live; start += ROWS) {
    const auto row = [&](int64_t i) { return BACK ? live - 1 - start - i : start + i; };
    state.count = smaller(ROWS, live - start);
    float keep[ROWS];
    for (int64_t i = 0; i < state.count; ++i) {
      const int64_t decayed = row(i) + BACK;
      keep[i] = decayed < live ? head.decay(decayed) : 1;
      fill(state, i, row(i));
    }
    state.decay(keep);
    state.pack();
    state.read([&](int64_t i, int64_t q, int64_t d, vec sum) __attribute__((always_inline)) {
      float* to = out + (q * rows + row(i)) * stride + d;
      store(to, sum, static_cast<int>(smaller(LANES, width - d)));
    });
    state.write();
  }
}

void clear(float* out, int64_t rows, int64_t live, int64_t stride, int64_t width) {
  for (int64_t i = live; i < rows; ++i) memset(out + i * stride, 0, width * sizeof(float));
}

void for_query(const Head& head, int64_t column, int64_t width) {
  const StateArgs& a = head.a;
  const int64_t rows = a.memory.rows, first = (head.b * a.memory.kv_heads + head.h) * GROUP;
  float* out = a.grad_query + first * rows * KEY_DIM + column;
  sweep<false, ForQuery>(head, width, out, KEY_DIM, [&](ForQuery& state, int64_t i, int64_t row) {
    constexpr int STRIDE = ForQuery::STRIDE;
    for (int64_t g = 0; g < GROUP; ++g) {
      copy_grad<STRIDE>(head, row, g, state.query + (i * GROUP + g) * STRIDE);
    }
    copy_value<STRIDE>(head, row, state.key + i * STRIDE);
    copy_columns(head.key(row) + column, width, state.value + i * KEY_COLUMNS);
  });
  for (int g = 0; g < GROUP; ++g) clear(out + g * rows * KEY_DIM, rows, head.live, KEY_DIM, width);
}

void for_key(const Head& head, int64_t column, int64_t width) {
  const StateArgs& a = head.a;
  const int64_t rows = a.memory.rows, item = head.b * a.memory.kv_heads + head.h;
  float* out = a.grad_key + item * rows * KEY_DIM + column;
  sweep<true, ForKey>(head, width, out, KEY_DIM, [&](ForKey& state, int64_t i, int64_t row) {
    constexpr int STRIDE = ForKey::STRIDE;
    copy_value<STRIDE>(head, row, state.query + i * STRIDE);
    for (int64_t g = 0; g < GROUP; ++g) {
      copy_grad<STRIDE>(head, row, g, state.key + (i * GROUP + g) * STRIDE);
      float* to = state.value + (i * GROUP + g) * KEY_COLUMNS;
      copy_columns(head.query(row, g) + column, width, to);
    }
  });
  clear(out, rows, head.live, KEY_DIM, width);
}

void for_value(const Head& head, int64_t column, int64_t width) {
  const StateArgs& a = head.a;
  const int64_t rows = a.memory.rows, item = head.b * a.memory.kv_heads + head.h;
  float* out = a.grad_value + item * rows * VALUE_DIM + column;
  sweep<true, ForValue>(head, width, out, VALUE_DIM, [&](ForValue& state, int64_t i, int64_t row) {
    constexpr int STRIDE = ForValue::STRIDE;
    copy_row<KEY_DIM, STRIDE>(head.key(row), state.query + i * STRIDE);
    for (int64_t g = 0; g < GROUP; ++g) {
      copy_row<KEY_DIM, STRIDE>(head.query(row, g), state.key + (i * GROUP + g) * STRIDE);
      float* to = state.value + (i * GROUP + g) * VALUE_COLUMNS;
      copy_columns(head.grad(row, g) + column, width, to);
    }
  });
  clear(out, rows, head.live, VALUE_DIM, width);
}

constexpr int KEY_BLOCKS = (KEY_DIM + KEY_COLUMNS - 1) / KEY_COLUMNS;
constexpr int VALUE_BLOCKS = (VALUE_DIM + VALUE_COLUMNS - 1) / VALUE_COLUMNS;
constexpr int BLOCKS = 2 * KEY_BLOCKS + VALUE_BLOCKS;

int64_t grad_items(const void* args) { return state_heads(args) * BLOCKS; }

void grads(const void* args, int64_t item, int64_t end) {
  const StateArgs& a = *static_cast<const StateArgs*>(args);
  for (; item < end; ++item) {
    const int64_t pair = item / BLOCKS, block = item % BLOCKS, b = pair / a.memory.kv_heads;
    const Head head{a, b, pair % a.memory.kv_heads, live_rows(a, b)};
    if (block < 2 * KEY_BLOCKS) {
      const int64_t column = block / 2 * KEY_COLUMNS;
      const int64_t width = smaller(KEY_COLUMNS, KEY_DIM - column);
      block % 2 ? for_key(head, column, width) : for_query(head, column, width);
    } else {
      const int64_t column = (block - 2 * KEY_BLOCKS) * VALUE_COLUMNS;
      for_value(head, column, smaller(VALUE_COLUMNS, VALUE_DIM - column));
    }
  }
}

float dot(const T* row, const float* grad) {
  vec total = zero();
  for (int d = 0; d < KEY_DIM; d += LANES) {
    const int some = static_cast<int>(smaller(LANES, KEY_DIM - d));
    total = fma(load(row + d, some), load(grad + d, some), total);
  }
  return sum(total);
}

int64_t decay_items(const void* args) { return state_heads(args); }

void decays(const void* args, int64_t item, int64_t end) {
  const StateArgs& a = *static_cast<const StateArgs*>(args);
  const Memory& m = a.memory;
  for (; item < end; ++item) {
    const int64_t b = item / m.kv_heads, h = item % m.kv_heads;
    {
      float* out = a.grad_decay + item * m.rows;
      clear(out, m.rows, 0, 1, 1);
      const int64_t pair = b * m.kv_heads + h;
      double behind = 0;
      for (int64_t i = live_rows(a, b) - 1; i > 0; --i) {
        double change = -dot(row_of<T>(a.key, b, h, i), a.grad_key + (pair * m.rows + i) * KEY_DIM);
        for (int64_t g = 0; g < GROUP; ++g) {
          const float* grad = a.grad_query + ((pair * GROUP + g) * m.rows + i) * KEY_DIM;
          change += dot(row_of<T>(a.query, b, h * GROUP + g, i), grad);
        }
        behind += change;
        out[i] = static_cast<float>(behind);
      }
    }
  }
}

int64_t scratch_bytes(const void*) { return 0; }

constexpr Phase PHASES[] = {
    {grad_items, grads},
    {decay_items, decays},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "state_chunk_f16_k136_v24_g11_gate_normalised_backward",
    scratch_bytes, PHASES);
