// append_index_bf16_k128_v128_fold_mean_value_mean_log_count
//
// Writes the records of groups, each from those of its children:
//
//   mean, value_mean, log_count
//
// Children are taken in their order, and only once all of a group's tokens are there: a record does
// not depend on the calls in which they were written. Of a call that completes no group nothing is
// left to be done, and no thread is woken.
#include <math.h>

#include "memcompile/kernel.h"
#include "memcompile/simd.h"

namespace {

using namespace memcompile;

using T = bf16;

constexpr int KEY_DIM = 128;
constexpr int VALUE_DIM = 128;

const FoldArgs& given(const void* args) { return *static_cast<const FoldArgs*>(args); }

// The groups first .. first + count - 1 of a sequence that the call's tokens complete.
struct Completed {
  int64_t first, count;

  Completed(const FoldArgs& a, int64_t sequence) {
    const Memory& m = a.memory;
    const int64_t size = a.child_size * a.ratio, begin = m.position[sequence];
    first = begin / size;
    count = (begin + larger(0, m.lengths[sequence])) / size - first;
  }
};

// One group's children, and where its record lies.
struct Group {
  const int32_t* child;  // their rows: `ratio` of them
  int64_t ratio;
  int64_t row;
};

template <int WIDTH>
constexpr int PADDED = (WIDTH + LANES - 1) / LANES * LANES;

// Calls each(column, record) for every vector of columns of a child's record.
template <int WIDTH, class Each>
MEMCOMPILE_INLINE void of_child(const void* pool, int64_t row, const Each& each) {
  const T* record = static_cast<const T*>(pool) + row * WIDTH;
  for (int d = 0; d < WIDTH; d += LANES) each(d, load(record + d, smaller(LANES, WIDTH - d)));
}

// Rounds a record of WIDTH elements into its place in the pool.
template <int WIDTH>
MEMCOMPILE_INLINE void write_record(const float* record, void* pool, int64_t row) {
  T* to = static_cast<T*>(pool) + row * WIDTH;
  for (int d = 0; d < WIDTH; d += LANES) store(to + d, load(record + d), smaller(LANES, WIDTH - d));
}

template <int WIDTH>
void mean_of(const void* pool, const Group& group, float* mean) {
  for (int d = 0; d < WIDTH; d += LANES) store(mean + d, zero());
  for (int64_t c = 0; c < group.ratio; ++c) {
    of_child<WIDTH>(pool, group.child[c], [&](int d, vec x) __attribute__((always_inline)) {
      store(mean + d, load(mean + d) + x);
    });
  }
  for (int d = 0; d < WIDTH; d += LANES) store(mean + d, load(mean + d) / all(group.ratio));
}

void write_records(const FoldArgs& a, const Group& group) {
  alignas(64) float mean[PADDED<KEY_DIM>];
  mean_of<KEY_DIM>(a.children[0], group, mean);
  write_record<KEY_DIM>(mean, a.index[0], group.row);
  alignas(64) float value_mean[PADDED<VALUE_DIM>];
  mean_of<VALUE_DIM>(a.children[1], group, value_mean);
  write_record<VALUE_DIM>(value_mean, a.index[1], group.row);
  static_cast<float*>(a.index[2])[group.row] = logf(a.child_size * a.ratio);
}

// Groups of each (sequence, KV head), at most.
int64_t most_groups(const FoldArgs& a) {
  int64_t most = 0;
  for (int64_t b = 0; b < a.memory.batch; ++b) most = larger(most, Completed(a, b).count);
  return most;
}

int64_t items(const void* args) {
  const Memory& m = given(args).memory;
  return m.batch * m.kv_heads * most_groups(given(args));
}

void fold(const void* args, int64_t item, int64_t end) {
  const FoldArgs& a = given(args);
  const Memory& m = a.memory;
  const int64_t most = most_groups(a);
  for (; item < end; ++item) {
    const int64_t pair = item / most, sequence = pair / m.kv_heads, head = pair % m.kv_heads;
    const Completed completed(a, sequence);
    if (item % most >= completed.count) continue;
    const int64_t logical = completed.first + item % most;
    const auto row = [&](const PageIds& table, int64_t column) {
      return table.data + sequence * table.batch_stride + head * table.head_stride + column;
    };
    const int32_t* children = row(a.child_table, logical * a.ratio);
    write_records(a, {children, a.ratio, *row(m.page_table, logical)});
  }
}

int64_t scratch_bytes(const void*) { return 0; }

constexpr Phase PHASES[] = {
    {items, fold},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "append_index_bf16_k128_v128_fold_mean_value_mean_log_count",
    scratch_bytes, PHASES);
