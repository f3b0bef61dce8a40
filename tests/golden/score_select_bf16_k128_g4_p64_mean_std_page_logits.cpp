// score_select_bf16_k128_g4_p64_mean_std_page_logits
//
//   score[q, page] = q . mean[page] + |q| . std[page]
//   score[page] = the largest of the 4 queries that share a KV head
//   logit[q, page] = q . mean[page], of the pages that the row chooses from
//
// A row reads its first pages, its last ones, and of those between, all full, the ones of the
// highest scores. Scores are kept as integers of the same order (keys): they need no care for what
// is not a number, and the lowest key that is selected is found by halving its range.
#include <float.h>
#include <stdlib.h>

#include "memcompile/kernel.h"
#include "memcompile/simd.h"

namespace {

using namespace memcompile;

using T = bf16;
using Stored = Dot<T>::Stored;
using Operand = Dot<T>::Operand;

constexpr int KEY_DIM = 128;
constexpr int GROUP = 4;  // query heads that share a KV head
constexpr int PAGE_SIZE = 64;

constexpr int ROWS = 8;  // of a block: a record is read once for all of them
constexpr int QUERIES = ROWS * GROUP;
constexpr int WIDTH = Dot<T>::WIDTH;
constexpr int STRIDE = (KEY_DIM + 31) / 32 * 32;  // of a block's queries
constexpr int CHUNK = 128;  // pages that are scored in one go
constexpr int PAGES = LANES / 4;  // that four queries meet in registers
constexpr int AHEAD = 16;   // pages whose records are asked for in advance

constexpr int32_t NEVER = INT32_MIN;  // the key of a page that cannot be selected

const ScoreSelectArgs& given(const void* args) {
  return *static_cast<const ScoreSelectArgs*>(args);
}

// Rows of a sequence that stand at a token.
int64_t live_rows(const ScoreSelectArgs& a, int64_t sequence) {
  return larger(0, smaller(a.memory.lengths[sequence], a.memory.rows));
}

// The logical pages that one row selects from, and how many it shall have in all.
struct Range {
  int64_t sinks;   // pages 0 .. sinks - 1 are always selected,
  int64_t window;  // and so are window .. end - 1; between them scores decide
  int64_t end;
  int64_t wanted;

  Range(const ScoreSelectArgs& a, int64_t sequence, int64_t row) {
    const int64_t token = a.memory.position[sequence] + row;
    const int64_t open = token / PAGE_SIZE;
    end = smaller(open + 1, a.memory.page_table.count);
    if (open < a.budget_pages || token < a.dense_below) {
      sinks = window = end;
      wanted = open + 1;
    } else {
      sinks = smaller(a.sink_pages, end);
      window = larger(sinks, smaller(open - a.window_pages, end));
      wanted = a.budget_pages;
    }
  }
};

// How the work is cut. Both phases find the same answer from the same arguments.
struct Plan {
  int64_t blocks;  // of a (sequence, KV head)
  int64_t width;   // keys of a row: pages up to the last that some row chooses from
  bool early;      // phase 1 scores, so that few blocks occupy all threads; otherwise phase 2 does
  int64_t pieces;  // of a block's pages, in phase 1

  explicit Plan(const ScoreSelectArgs& a) {
    const Memory& m = a.memory;
    int64_t pages = 0;
    for (int64_t b = 0; b < m.batch; ++b) {
      if (!live_rows(a, b)) continue;
      const Range last(a, b, live_rows(a, b) - 1);
      if (last.sinks < last.window) pages = larger(pages, last.window);
    }
    blocks = divide_up(m.rows, ROWS);
    width = divide_up(pages, LANES) * LANES;
    const int64_t items = larger(1, m.batch * m.kv_heads * blocks);
    early = items < 4 * m.threads;
    pieces = smaller(divide_up(width, CHUNK), divide_up(8 * m.threads, items));
  }
};

// The records of all pages, a row each.
struct Records {
  const T* mean;
  const T* std;

  explicit Records(const ScoreSelectArgs& a)
      : mean(static_cast<const T*>(a.index[0])),
        std(static_cast<const T*>(a.index[1])) {}
};

// The queries of consecutive rows of one (sequence, KV head), as each term of the score takes them.
struct Block {
  int64_t sequence;
  int64_t kv_head;
  int64_t row;  // the first
  int rows;     // those that stand at a token
  alignas(64) Stored same[QUERIES * STRIDE];
  alignas(64) Stored magnitude[QUERIES * STRIDE];

  Block(const ScoreSelectArgs& a, int64_t pair, int64_t nth)
      : sequence(pair / a.memory.kv_heads), kv_head(pair % a.memory.kv_heads), row(nth * ROWS) {
    rows = static_cast<int>(larger(0, smaller(ROWS, live_rows(a, sequence) - row)));
  }

  // What the last row chooses from, and with it every other one.
  Range range(const ScoreSelectArgs& a) const { return Range(a, sequence, row + rows - 1); }
};

void read_queries(const ScoreSelectArgs& a, Block& block) {
  for (int q = 0; q < block.rows * GROUP; ++q) {
    const int64_t head = block.kv_head * GROUP + q % GROUP, row = block.row + q / GROUP;
    const T* from = static_cast<const T*>(a.query.data) + block.sequence * a.query.batch_stride +
                    head * a.query.head_stride + row * a.query.row_stride;
    for (int d = 0; d < STRIDE; d += LANES) {
      const vec v = d < KEY_DIM ? load(from + d, smaller(LANES, KEY_DIM - d)) : zero();
      store(block.same + q * STRIDE + d, v);
      store(block.magnitude + q * STRIDE + d, abs(v));
    }
  }
}

// Adds [Q, Dk] @ [Dk, PAGES] of one term: dot[t * PAGES + p]. The first queries to meet a record
// ask for one further on, into the second level: asking for the first costs more than it gains.
template <int Q, bool FIRST>
MEMCOMPILE_INLINE void add_dots(const Stored* queries, int q, const T* records,
                                const int64_t* page, vec* dot) {
  const T* record_of[PAGES];
  const T* ahead[PAGES];
#pragma GCC unroll 4
  for (int p = 0; p < PAGES; ++p) {
    record_of[p] = records + page[p] * KEY_DIM;
    if (FIRST) ahead[p] = records + page[p + AHEAD] * KEY_DIM;
  }
#pragma GCC unroll 4
  for (int d = 0; d < KEY_DIM; d += WIDTH) {
    Operand query[Q];
#pragma GCC unroll 4
    for (int t = 0; t < Q; ++t) query[t] = Dot<T>::load(queries + (q + t) * STRIDE + d);
#pragma GCC unroll 4
    for (int p = 0; p < PAGES; ++p) {
      if (FIRST) prefetch_l2(ahead[p], d, smaller(d + WIDTH, KEY_DIM));
      const Operand record = Dot<T>::load(record_of[p] + d, KEY_DIM - d);
#pragma GCC unroll 4
      for (int t = 0; t < Q; ++t) {
        dot[t * PAGES + p] = Dot<T>::add(dot[t * PAGES + p], query[t], record);
      }
    }
  }
}

// Lane t * PAGES + p becomes to[t * CHUNK + p].
template <int Q>
MEMCOMPILE_INLINE void store_tile(vec tile, float* to) {
  float each[LANES];
  store(each, tile);
#pragma GCC unroll 4
  for (int t = 0; t < Q; ++t) memcpy(to + t * CHUNK, each + t * PAGES, sizeof(float) * PAGES);
}

// Q queries times PAGES records.
template <int Q, bool FIRST>
void score_tile(const Block& block, int q, const Records& records,
                const int64_t* page, float* scores, float* logits) {
  vec dot[LANES] = {};
  add_dots<Q, FIRST>(block.same, q, records.mean, page, dot);
  const vec products = sums(dot);
  store_tile<Q>(products, logits);
#pragma GCC unroll 16
  for (vec& each : dot) each = zero();
  add_dots<Q, FIRST>(block.magnitude, q, records.std, page, dot);
  store_tile<Q>(products + sums(dot), scores);
}

// An integer that stands in the same order as the score; NaN counts as the lowest.
MEMCOMPILE_INLINE int32_t key_of(float score) {
  score = score >= -FLT_MAX ? score : -FLT_MAX;
  score = score <= FLT_MAX ? score : FLT_MAX;
  const int32_t bits = __builtin_bit_cast(int32_t, score + 0.0f);  // -0 and 0 are equal
  return bits ^ (bits >> 31 & INT32_MAX);
}

// The logits of one query head and row: [pages].
float* logits_of(const ScoreSelectArgs& a, int64_t sequence, int64_t head, int64_t row) {
  const Memory& m = a.memory;
  const int64_t query = (sequence * m.kv_heads * GROUP + head) * m.rows + row;
  return a.page_logits + query * m.page_table.count;
}

// Scores pages first .. first + count - 1, CHUNK of them at most, of which page[] has the places in
// the pools. keys[i * width + p] becomes the key that page first + p has for the block's row i.
void score_chunk(const ScoreSelectArgs& a, const Block& block, int64_t first,
                 const int64_t* page, const int32_t* physical, int count,
                 int32_t* keys, int64_t width) {
  // [QUERIES, Dk] @ [Dk, count]
  alignas(64) float scores[QUERIES * CHUNK];
  alignas(64) float logits[QUERIES * CHUNK];
  const Records records(a);
  const int queries = block.rows * GROUP;
  for (int q = 0; q < queries; ++q) {
    const int64_t head = block.kv_head * GROUP + q % GROUP, row = block.row + q / GROUP;
    prefetch_to_write(logits_of(a, block.sequence, head, row) + first, count);
  }
  for (int p = 0; p < count; p += PAGES) {
    int q = 0;
    for (; q + 4 <= queries; q += 4) {
      const auto tile = q == 0 ? score_tile<4, true> : score_tile<4, false>;
      tile(block, q, records, page + p, scores + q * CHUNK + p, logits + q * CHUNK + p);
    }
  }

  for (int p = 0; p < count; ++p) {
    if (physical[p] >= 0) continue;
    for (int q = 0; q < queries; ++q) logits[q * CHUNK + p] = -INFINITE;
  }
  for (int i = 0; i < block.rows; ++i) {
    const Range own(a, block.sequence, block.row + i);
    const int64_t from = larger(first, own.sinks), to = smaller(first + count, own.window);
    for (int g = 0; g < GROUP && from < to; ++g) {
      float* out = logits_of(a, block.sequence, block.kv_head * GROUP + g, block.row + i);
      memcpy(out + from, logits + (i * GROUP + g) * CHUNK + from - first,
             sizeof(float) * (to - from));
    }
  }

  // The largest of the group, as a key.
  for (int i = 0; i < block.rows; ++i) {
    float* best = scores + i * GROUP * CHUNK;
    for (int g = 1; g < GROUP; ++g) {
      const float* other = best + g * CHUNK;
      for (int p = 0; p < count; ++p) {
        best[p] = other[p] > best[p] || other[p] != other[p] ? other[p] : best[p];  // NaN stays
      }
    }
    for (int p = 0; p < count; ++p) keys[i * width + p] = physical[p] < 0 ? NEVER : key_of(best[p]);
  }
}

// Scores logical pages begin .. end - 1 for a block: keys[i * width + p] is row i's of page p.
void score_pages(const ScoreSelectArgs& a, const Block& block, int64_t begin, int64_t end,
                 int32_t* keys, int64_t width) {
  const PageIds& table = a.memory.page_table;
  const int32_t* physical = table.data + block.sequence * table.batch_stride +
                            block.kv_head * table.head_stride;
  int64_t any = -1;  // where the table has a hole, another page is read
  for (int64_t p = begin; p < end; ++p) any = physical[p] >= 0 ? physical[p] : any;
  if (any < 0) {
    for (int i = 0; i < block.rows; ++i) {
      for (int64_t p = begin; p < end; ++p) keys[i * width + p] = NEVER;
      for (int g = 0; g < GROUP; ++g) {
        const int64_t head = block.kv_head * GROUP + g;
        float* out = logits_of(a, block.sequence, head, block.row + i);
        for (int64_t p = begin; p < end; ++p) out[p] = -INFINITE;
      }
    }
    return;
  }
  const Records records(a);
  for (int64_t first = begin; first < end; first += CHUNK) {
    const int64_t left = end - first;
    int64_t page[CHUNK + AHEAD];
    for (int p = 0; p < CHUNK + AHEAD; ++p) {
      page[p] = p < left && physical[first + p] >= 0 ? physical[first + p] : any;
    }
    if (first == begin) {
      for (int p = 0; p < AHEAD; ++p) {
        prefetch_l2(records.mean + page[p] * KEY_DIM, 0, KEY_DIM);
        prefetch_l2(records.std + page[p] * KEY_DIM, 0, KEY_DIM);
      }
    }
    score_chunk(a, block, first, page, physical + first,
                static_cast<int>(smaller(CHUNK, left)), keys + first, width);
  }
}

// One row's list of pages, in ascending order.
struct List {
  int32_t* page;
  int64_t count;
  int64_t wanted;

  void add(int64_t logical) {
    if (count < wanted) page[count++] = static_cast<int32_t>(logical);
  }
};

int64_t at_least(int32_t lowest, const int32_t* keys, int64_t count) {
  int32_t found = 0;
  for (int64_t p = 0; p < count; ++p) found += keys[p] >= lowest;
  return found;
}

// Adds the `some` pages of the highest keys among first .. first + count - 1, whose keys these are;
// of equal ones the lower page.
void add_best(const int32_t* keys, int64_t first, int64_t count, int64_t some, List& list) {
  int32_t low = NEVER + 1;  // the lowest key that is selected,
  int64_t equal = count;    // and how many pages of that key are
  int64_t found = at_least(low, keys, count);
  if (found > some) {
    int32_t high = INT32_MAX;  // `above` keys, fewer than `some`, are as high
    int64_t above = 0;
    while (found != some && int64_t{high} - low > 1) {
      const int32_t middle = static_cast<int32_t>((int64_t{low} + high) >> 1);
      found = at_least(middle, keys, count);
      if (found >= some) {
        low = middle;
      } else {
        high = middle;
        above = found;
      }
    }
    if (found != some) equal = some - above;
  }
  constexpr int64_t STEP = 64;
  for (int64_t from = 0; from < count; from += STEP) {
    const int64_t to = smaller(from + STEP, count);
    if (!at_least(low, keys + from, to - from)) continue;
    for (int64_t p = from; p < to; ++p) {
      if (keys[p] > low || (keys[p] == low && equal-- > 0)) list.add(first + p);
    }
  }
}

// Writes the list of one row. keys[p] is the key of logical page p. Pages without a score have no
// logit.
void select_row(const ScoreSelectArgs& a, int64_t sequence, int64_t kv_head, int64_t row,
                const int32_t* keys) {
  const Memory& m = a.memory;
  const int64_t at = (sequence * m.kv_heads + kv_head) * m.rows + row;
  List list{a.pages + at * a.capacity, 0, 0};
  if (row < live_rows(a, sequence)) {
    const Range range(a, sequence, row);
    const PageIds& table = m.page_table;
    const int32_t* physical = table.data + sequence * table.batch_stride +
                              kv_head * table.head_stride;
    list.wanted = smaller(range.wanted, a.capacity);
    for (int64_t p = 0; p < range.sinks; ++p) {
      if (physical[p] >= 0) list.add(p);
    }
    int64_t window = 0;
    for (int64_t p = range.window; p < range.end; ++p) window += physical[p] >= 0;
    const int64_t some = list.wanted - list.count - window;
    if (some > 0 && range.sinks < range.window) {
      add_best(keys + range.sinks, range.sinks, range.window - range.sinks, some, list);
    }
    for (int64_t p = range.window; p < range.end; ++p) {
      if (physical[p] >= 0) list.add(p);
    }
  }
  for (int64_t i = list.count; i < a.capacity; ++i) list.page[i] = -1;
  int64_t from = 0, to = 0;
  if (row < live_rows(a, sequence)) {
    const Range range(a, sequence, row);
    from = range.sinks;
    to = range.window;
  }
  for (int g = 0; g < GROUP; ++g) {
    float* out = logits_of(a, sequence, kv_head * GROUP + g, row);
    for (int64_t p = 0; p < from; ++p) out[p] = -INFINITE;
    for (int64_t p = to; p < m.page_table.count; ++p) out[p] = -INFINITE;
  }
}

// Phase 1: item = (sequence, KV head, block, piece).
int64_t score_items(const void* args) {
  const Memory& m = given(args).memory;
  const Plan plan(given(args));
  return plan.early ? m.batch * m.kv_heads * plan.blocks * plan.pieces : 0;
}

void score(const void* args, int64_t item, int64_t end) {
  const ScoreSelectArgs& a = given(args);
  const Plan plan(a);
  for (; item < end; ++item) {
    const int64_t piece = item % plan.pieces, nth = item / plan.pieces;
    Block block(a, nth / plan.blocks, nth % plan.blocks);
    const Range range = block.range(a);
    const int64_t from = larger(range.sinks, plan.width * piece / plan.pieces);
    const int64_t to = smaller(range.window, plan.width * (piece + 1) / plan.pieces);
    if (!block.rows || from >= to) continue;
    read_queries(a, block);
    int32_t* keys = static_cast<int32_t*>(a.memory.scratch);
    keys += (nth / plan.blocks * a.memory.rows + block.row) * plan.width;
    score_pages(a, block, from, to, keys, plan.width);
  }
}

// Phase 2: item = row, or (sequence, KV head, block) where phase 1 had nothing to do.
int64_t select_items(const void* args) {
  const Memory& m = given(args).memory;
  const Plan plan(given(args));
  return m.batch * m.kv_heads * (plan.early ? m.rows : plan.blocks);
}

// Keys of one block; a thread keeps the memory from call to call.
struct Keys {
  int32_t* memory = nullptr;
  int64_t size = 0;

  int32_t* reserve(int64_t count) {
    if (count > size) {
      free(memory);
      memory = static_cast<int32_t*>(malloc(count * sizeof(int32_t)));
      size = count;
    }
    return memory;
  }
  ~Keys() { free(memory); }
};

void choose(const void* args, int64_t item, int64_t end) {
  const ScoreSelectArgs& a = given(args);
  const Memory& m = a.memory;
  const Plan plan(a);
  if (plan.early) {
    const int32_t* keys = static_cast<const int32_t*>(m.scratch);
    for (; item < end; ++item) {
      const int64_t pair = item / m.rows;
      select_row(a, pair / m.kv_heads, pair % m.kv_heads, item % m.rows, keys + item * plan.width);
    }
    return;
  }
  static thread_local Keys held;
  int32_t* keys = held.reserve(smaller(ROWS, m.rows) * plan.width);
  for (; item < end; ++item) {
    Block block(a, item / plan.blocks, item % plan.blocks);
    const Range range = block.range(a);
    if (block.rows && range.sinks < range.window) {
      read_queries(a, block);
      score_pages(a, block, range.sinks, range.window, keys, plan.width);
    }
    for (int64_t row = block.row; row < smaller(block.row + ROWS, m.rows); ++row) {
      select_row(a, block.sequence, block.kv_head, row, keys + (row - block.row) * plan.width);
    }
  }
}

int64_t scratch_bytes(const void* args) {
  const Memory& m = given(args).memory;
  const Plan plan(given(args));
  if (!plan.early) return 0;
  return m.batch * m.kv_heads * m.rows * plan.width * static_cast<int64_t>(sizeof(int32_t));
}

constexpr Phase PHASES[] = {
    {score_items, score},
    {select_items, choose},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "score_select_bf16_k128_g4_p64_mean_std_page_logits",
    scratch_bytes, PHASES);
