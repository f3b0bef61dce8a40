// append_index_bf16_k128_v128_p64_mean_std_value_mean_log_count
//
// Writes tokens into their pages, then the records of the pages that they fill:
//
//   mean, std, value_mean, log_count
//
// A record is computed from all slots of its page in their order, so that it does not depend on the
// calls in which they were written. The open page has none.
#include <math.h>

#include "memcompile/kernel.h"
#include "memcompile/simd.h"

namespace {

using namespace memcompile;

using T = bf16;

constexpr int KEY_DIM = 128;
constexpr int VALUE_DIM = 128;
constexpr int PAGE_SIZE = 64;
constexpr int64_t ROW_BYTES = (KEY_DIM + VALUE_DIM) * sizeof(T);

const AppendIndexArgs& given(const void* args) {
  return *static_cast<const AppendIndexArgs*>(args);
}

// The tokens begin .. end - 1 that a call adds to one sequence, and the pages they touch.
struct Added {
  int64_t begin, end;
  int64_t first_page, pages;

  Added(const AppendIndexArgs& a, int64_t sequence) {
    const Memory& m = a.memory;
    begin = m.position[sequence];
    end = begin + larger(0, smaller(m.lengths[sequence], m.rows));
    first_page = begin / PAGE_SIZE;
    pages = end > begin ? (end - 1) / PAGE_SIZE - first_page + 1 : 0;
  }
};

void write_rows(const Rows& from, int64_t sequence, int64_t head, int64_t row, int64_t count,
                int width, T* to) {
  const T* source = static_cast<const T*>(from.data) + sequence * from.batch_stride +
                    head * from.head_stride + row * from.row_stride;
  for (int64_t i = 0; i < count; ++i) {
    memcpy(to + i * width, source + i * from.row_stride, width * sizeof(T));
  }
}

constexpr int SIDE = LANES == 16 ? 8 : 4;  // vectors of columns that are worked on side by side

template <int WIDTH>
constexpr int VECTORS = (WIDTH + LANES - 1) / LANES;

// The mean of term(element, column) over the rows [PAGE_SIZE, WIDTH]: for N vectors of columns.
template <int WIDTH, int N, class Term>
MEMCOMPILE_INLINE void some_means(const T* rows, int column, const Term& term, float* mean) {
  vec total[N];
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) total[v] = zero();
  for (int i = 0; i < PAGE_SIZE; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < N; ++v) {
      const int at = column + v * LANES;
      total[v] = total[v] + term(load(rows + i * WIDTH + at, smaller(LANES, WIDTH - at)), at);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < N; ++v) store(mean + column + v * LANES, total[v] / all(PAGE_SIZE));
}

// For all columns; mean has room for whole vectors.
template <int WIDTH, class Term>
MEMCOMPILE_INLINE void means(const T* rows, const Term& term, float* mean) {
  constexpr int REST = VECTORS<WIDTH> % SIDE, WHOLE = (VECTORS<WIDTH> - REST) * LANES;
  for (int d = 0; d < WHOLE; d += SIDE * LANES) {
    some_means<WIDTH, SIDE>(rows, d, term, mean);
  }
  if constexpr (REST > 0) some_means<WIDTH, REST>(rows, WHOLE, term, mean);
}

// Rounds a record of WIDTH elements into its place in the pool.
template <int WIDTH>
MEMCOMPILE_INLINE void write_record(const float* record, void* pool, int64_t page) {
  T* to = static_cast<T*>(pool) + page * WIDTH;
  for (int d = 0; d < WIDTH; d += LANES) store(to + d, load(record + d), smaller(LANES, WIDTH - d));
}

// Computes the records of a page that is full.
void write_records(const AppendIndexArgs& a, int64_t page) {
  const T* keys = static_cast<const T*>(a.key_pages) + page * PAGE_SIZE * KEY_DIM;
  const auto itself = [](vec x, int) __attribute__((always_inline)) { return x; };
  alignas(64) float mean[VECTORS<KEY_DIM> * LANES];
  means<KEY_DIM>(keys, itself, mean);
  alignas(64) float std[VECTORS<KEY_DIM> * LANES];
  const auto square = [&](vec key, int column) __attribute__((always_inline)) {
    const vec apart = key - load(mean + column);
    return apart * apart;
  };
  means<KEY_DIM>(keys, square, std);
  for (int d = 0; d < KEY_DIM; d += LANES) store(std + d, sqrt(load(std + d)));
  alignas(64) float value_mean[VECTORS<VALUE_DIM> * LANES];
  const T* values = static_cast<const T*>(a.value_pages) + page * PAGE_SIZE * VALUE_DIM;
  means<VALUE_DIM>(values, itself, value_mean);

  write_record<KEY_DIM>(mean, a.index[0], page);
  write_record<KEY_DIM>(std, a.index[1], page);
  write_record<VALUE_DIM>(value_mean, a.index[2], page);
  static_cast<float*>(a.index[3])[page] = logf(PAGE_SIZE);
}

// How the work is cut: in touched pages of (sequence, KV head) pairs.
struct Plan {
  int64_t pages;    // of a pair
  int64_t all;      // of all pairs
  int64_t of_item;  // enough to be worth a thread: few tokens that fill no page are not

  explicit Plan(const AppendIndexArgs& a) : pages(0) {
    const Memory& m = a.memory;
    int64_t rows = 0;
    for (int64_t b = 0; b < m.batch; ++b) {
      const Added added(a, b);
      pages = larger(pages, added.pages);
      rows = larger(rows, added.end - added.begin);
      if (added.end / PAGE_SIZE > added.first_page) rows = PAGE_SIZE;
    }
    all = m.batch * m.kv_heads * pages;
    const int64_t bytes = smaller(rows, PAGE_SIZE) * ROW_BYTES;
    of_item = larger(1, (1 << 15) / larger(1, bytes));
  }
};

int64_t items(const void* args) {
  const Plan plan(given(args));
  return divide_up(plan.all, plan.of_item);
}

void append(const void* args, int64_t item, int64_t end) {
  const AppendIndexArgs& a = given(args);
  const Memory& m = a.memory;
  const Plan plan(a);
  const int64_t last = smaller(end * plan.of_item, plan.all);
  for (int64_t at = item * plan.of_item; at < last; ++at) {
    const int64_t nth = at % plan.pages, pair = at / plan.pages;
    const int64_t sequence = pair / m.kv_heads, head = pair % m.kv_heads;
    const Added added(a, sequence);
    if (nth >= added.pages) continue;
    const int64_t logical = added.first_page + nth, start = logical * PAGE_SIZE;
    const int64_t page = m.page_table.data[sequence * m.page_table.batch_stride +
                                           head * m.page_table.head_stride + logical];
    const int64_t begin = larger(added.begin, start), stop = smaller(added.end, start + PAGE_SIZE);
    const int64_t row = begin - added.begin, slot = page * PAGE_SIZE + begin - start;
    write_rows(a.key, sequence, head, row, stop - begin, KEY_DIM,
               static_cast<T*>(a.key_pages) + slot * KEY_DIM);
    write_rows(a.value, sequence, head, row, stop - begin, VALUE_DIM,
               static_cast<T*>(a.value_pages) + slot * VALUE_DIM);
    if (stop == start + PAGE_SIZE) write_records(a, page);
  }
}

int64_t scratch_bytes(const void*) { return 0; }

constexpr Phase PHASES[] = {
    {items, append},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "append_index_bf16_k128_v128_p64_mean_std_value_mean_log_count",
    scratch_bytes, PHASES);
