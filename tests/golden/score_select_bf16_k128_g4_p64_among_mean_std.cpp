// score_select_bf16_k128_g4_p64_among_mean_std
//
//   score[q, page] = q . mean[page] + |q| . std[page]
//   score[page] = the largest of the 4 queries that share a KV head
//
// A row's list has all of its candidates, if they fit; else those of the first and the last pages,
// and of the others, all full, the ones of the highest scores. Scores are kept as integers of the
// same order (keys), among which the lowest that is selected is found by halving its range.
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

constexpr int ROWS = 1;  // of a block: a record is read once for all of them
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
                const int64_t* page, float* scores) {
  vec dot[LANES] = {};
  add_dots<Q, FIRST>(block.same, q, records.mean, page, dot);
  add_dots<Q, FIRST>(block.magnitude, q, records.std, page, dot);
  store_tile<Q>(sums(dot), scores);
}

// An integer that stands in the same order as the score; NaN counts as the lowest.
MEMCOMPILE_INLINE int32_t key_of(float score) {
  score = score >= -FLT_MAX ? score : -FLT_MAX;
  score = score <= FLT_MAX ? score : FLT_MAX;
  const int32_t bits = __builtin_bit_cast(int32_t, score + 0.0f);  // -0 and 0 are equal
  return bits ^ (bits >> 31 & INT32_MAX);
}

// Scores pages first .. first + count - 1, CHUNK of them at most, of which page[] has the places in
// the pools. keys[i * width + p] becomes the key that page first + p has for the block's row i.
void score_chunk(const ScoreSelectArgs& a, const Block& block, const int64_t* page,
                 const int32_t* physical, int count,
                 int32_t* keys, int64_t width) {
  // [QUERIES, Dk] @ [Dk, count]
  alignas(64) float scores[QUERIES * CHUNK];
  const Records records(a);
  const int queries = block.rows * GROUP;
  for (int p = 0; p < count; p += PAGES) {
    int q = 0;
    for (; q + 4 <= queries; q += 4) {
      const auto tile = q == 0 ? score_tile<4, true> : score_tile<4, false>;
      tile(block, q, records, page + p, scores + q * CHUNK + p);
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

// Scores the pages that lie at physical[0] .. physical[end - 1], -1 being none, for a block of one
// row.
void score_pages(const ScoreSelectArgs& a, const Block& block, const int32_t* physical, int64_t end,
                 int32_t* keys) {
  const int64_t begin = 0, width = end;
  int64_t any = -1;  // where the table has a hole, another page is read
  for (int64_t p = begin; p < end; ++p) any = physical[p] >= 0 ? physical[p] : any;
  if (any < 0) {
    for (int i = 0; i < block.rows; ++i) {
      for (int64_t p = begin; p < end; ++p) keys[i * width + p] = NEVER;
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
    score_chunk(a, block, page, physical + first,
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

// A row's candidates that are in the table and not past its open page.
struct Candidates {
  int32_t* page;
  int32_t* physical;  // -1: always selected, and never read
  int32_t* keys;
  int64_t count = 0;
  int64_t forced = 0;

  Candidates(const ScoreSelectArgs& a, int64_t sequence, int64_t kv_head, int64_t row,
             int32_t* memory)
      : page(memory), physical(page + a.candidates.count), keys(physical + a.candidates.count) {
    const PageIds& table = a.memory.page_table;
    const int32_t* place = table.data + sequence * table.batch_stride +
                           kv_head * table.head_stride;
    const int32_t* candidate = a.candidates.data + sequence * a.candidates.batch_stride +
                               kv_head * a.candidates.head_stride + row * a.candidates.row_stride;
    const int64_t open = (a.memory.position[sequence] + row) / PAGE_SIZE;
    for (int64_t i = 0; i < a.candidates.count; ++i) {
      const int64_t logical = candidate[i];
      if (logical < 0 || logical > open || logical >= table.count || place[logical] < 0) continue;
      const bool always = logical < a.sink_pages || logical >= open - a.window_pages;
      page[count] = static_cast<int32_t>(logical);
      physical[count++] = always ? -1 : place[logical];
      forced += always;
    }
  }
};

// Writes the list of one row.
void select_row(const ScoreSelectArgs& a, int64_t pair, int64_t row, int32_t* memory) {
  const Memory& m = a.memory;
  const int64_t sequence = pair / m.kv_heads, kv_head = pair % m.kv_heads;
  List list{a.pages + (pair * m.rows + row) * a.capacity, 0, a.capacity};
  if (row < live_rows(a, sequence)) {
    const Candidates from(a, sequence, kv_head, row, memory);
    if (from.count <= list.wanted || from.forced >= list.wanted) {
      const bool all = from.count <= list.wanted;
      for (int64_t i = 0; i < from.count; ++i) {
        if (all || from.physical[i] < 0) list.add(from.page[i]);
      }
    } else {
      Block block(a, pair, row);
      read_queries(a, block);
      score_pages(a, block, from.physical, from.count, from.keys);
      for (int64_t i = 0; i < from.count; ++i) {
        if (from.physical[i] < 0) from.keys[i] = INT32_MAX;
      }
      add_best(from.keys, 0, from.count, list.wanted, list);
      for (int64_t i = 0; i < list.count; ++i) list.page[i] = from.page[list.page[i]];
    }
  }
  for (int64_t i = list.count; i < a.capacity; ++i) list.page[i] = -1;
}

int64_t items(const void* args) {
  const Memory& m = given(args).memory;
  return m.batch * m.kv_heads * m.rows;
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
  static thread_local Keys held;
  int32_t* memory = held.reserve(3 * a.candidates.count);
  for (; item < end; ++item) select_row(a, item / a.memory.rows, item % a.memory.rows, memory);
}

int64_t scratch_bytes(const void*) { return 0; }

constexpr Phase PHASES[] = {
    {items, choose},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "score_select_bf16_k128_g4_p64_among_mean_std",
    scratch_bytes, PHASES);
