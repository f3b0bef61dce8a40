// attend_bf16_k128_v128_g4_p64_listed_summaries
//
//   out[q] = sum over keys k of exp(logit[q, k] - lse[q]) * value[k]
//   logit[q, k] = scale * query[q] . key[k]
//
// A full page that is not listed is one key, its record: its logit is scale * page_logit[q, page]
// + page_bias[page], its value page_value[page].
//
// Queries that share a KV head are a block: a tile of keys is read once for all of them. Tiles
// follow each other under an online softmax; where blocks are few, a block's pages are split
// between items, and a second phase merges the parts.
#include <math.h>

#include "memcompile/attention.h"
#include "memcompile/kernel.h"

namespace {

using namespace memcompile;

using T = bf16;
using Stored = Dot<T>::Stored;
using Weight = Mix<T>::Weight;

constexpr int KEY_DIM = 128;
constexpr int VALUE_DIM = 128;
constexpr int GROUP = 4;  // query heads that share a KV head
constexpr int PAGE_SIZE = 64;

constexpr int ROWS = 1;   // of a block
constexpr int HEADS = 4;  // of a block
constexpr int BLOCK = ROWS * HEADS;
constexpr int CHUNKS = (GROUP + HEADS - 1) / HEADS;  // blocks that a group takes
constexpr int QUERY_STRIDE = (KEY_DIM + 31) / 32 * 32;
constexpr int OUT_STRIDE = (VALUE_DIM + 31) / 32 * 32;
constexpr int64_t SPLIT_KEYS = 512;  // a part with fewer would cost more to merge than it saves

// How the work is cut. Both phases find the same answer from the same arguments.
struct Plan {
  int64_t blocks;  // of a (sequence, KV head)
  int64_t splits;

  explicit Plan(const AttendArgs& a) {
    const Memory& m = a.memory;
    blocks = divide_up(m.rows, ROWS) * CHUNKS;
    int64_t longest = 0;
    for (int64_t b = 0; b < m.batch; ++b) longest = larger(longest, m.position[b] + m.lengths[b]);
    longest = smaller(longest, a.pages.count * PAGE_SIZE) + longest / PAGE_SIZE;
    const int64_t items = larger(1, m.batch * m.kv_heads * blocks), wanted = 4 * m.threads;
    splits = items >= wanted || m.threads == 1 ? 1 : divide_up(wanted, items);
    splits = larger(1, smaller(splits, longest / SPLIT_KEYS));
  }
};

// The queries of one item, and how far their softmax has come.
struct Block {
  int64_t sequence;
  int64_t kv_head;
  int64_t row;   // the first
  int64_t head;  // the first, in its group
  int heads;
  int count;  // queries, row by row, that stand at a token
  int64_t low, high;    // slots that some query sees: low .. high - 1
  int64_t begin, end;   // slots that every query sees
  int64_t start[BLOCK], stop[BLOCK];
  alignas(64) Stored query[BLOCK * QUERY_STRIDE];
  alignas(64) float out[BLOCK * OUT_STRIDE];
  // By band, at its first query: the logits' maximum so far, and sums by lane of the weights, as
  // they are (for lse) and as they were rounded to multiply the values.
  vec peak[BLOCK], total[BLOCK], rounded[BLOCK];
};

// Where an item stands among its pages.
struct Walk {
  const int32_t* table;
  const int32_t* list;
  int64_t listed;
  int64_t at, end;  // entries of the list
  int64_t slot;     // of the page, the next to read
  int64_t record, records;  // logical pages, of which those not listed are read by their records
  int64_t known;      // skip[] tells of pages known - 512 .. known - 1
  uint64_t skip[8];
};

void read_queries(const AttendArgs& a, Block& block) {
  const Memory& m = a.memory;
  const int64_t live = smaller(m.lengths[block.sequence], m.rows) - block.row;
  const int rows = static_cast<int>(larger(0, smaller(ROWS, live)));
  block.count = rows * block.heads;
  block.low = block.end = INT64_MAX;
  block.high = block.begin = 0;
  for (int i = 0; i < rows; ++i) {
    const int64_t token = m.position[block.sequence] + block.row + i;
    const int64_t stop = token + 1;
    const int64_t start = 0;
    block.low = smaller(block.low, start);
    block.high = larger(block.high, stop);
    block.begin = larger(block.begin, start);
    block.end = smaller(block.end, stop);
    for (int h = 0; h < block.heads; ++h) {
      const int q = i * block.heads + h;
      block.start[q] = start;
      block.stop[q] = stop;
      const int64_t head = block.kv_head * GROUP + block.head + h;
      const T* from = static_cast<const T*>(a.query.data) + block.sequence * a.query.batch_stride +
                      head * a.query.head_stride + (block.row + i) * a.query.row_stride;
      Stored* to = block.query + q * QUERY_STRIDE;
      for (int d = 0; d < KEY_DIM; d += LANES) {
        store(to + d, load(from + d, smaller(LANES, KEY_DIM - d)));
      }
      for (int d = divide_up(KEY_DIM, LANES) * LANES; d < QUERY_STRIDE; d += LANES) {
        store(to + d, zero());
      }
      for (int d = 0; d < OUT_STRIDE; d += LANES) store(block.out + q * OUT_STRIDE + d, zero());
      block.peak[q] = all(-INFINITE);
      block.total[q] = block.rounded[q] = zero();
    }
  }
}

// Notes which of the next 512 pages are in the list.
void look_up(Walk& walk) {
  for (uint64_t& bits : walk.skip) bits = 0;
  for (int64_t i = 0; i < walk.listed; ++i) {
    const int64_t page = walk.list[i] - walk.known;
    if (page >= 0 && page < 512) walk.skip[page / 64] |= uint64_t{1} << page % 64;
  }
  walk.known += 512;
}

// Adds keys that lie side by side, from that slot of the pools on.
void add(const AttendArgs& a, Tile<T>& tile, int64_t slot, int count) {
  const T* key = static_cast<const T*>(a.key_pages) + slot * KEY_DIM;
  const T* value = static_cast<const T*>(a.value_pages) + slot * VALUE_DIM;
  const int first = tile.count;
  for (int i = 0; i < count; ++i) {
    tile.place[first + i] = 0;
    tile.key[first + i] = key + i * KEY_DIM;
    tile.value[first + i] = value + i * VALUE_DIM;
  }
  tile.count += count;
}

// Gathers the next keys of listed pages; an empty tile is the end.
void fill_keys(const AttendArgs& a, const Block& block, Walk& walk, Tile<T>& tile) {
  tile.count = 0;
  tile.page = -1;
  while (tile.count < TILE && walk.at < walk.end) {
    const int64_t page = walk.list[walk.at];
    const bool known = page >= 0 && page < a.memory.page_table.count;
    const int64_t physical = known ? walk.table[page] : -1;
    const int64_t first = page * PAGE_SIZE;
    const int64_t from = larger(walk.slot, block.low - first);
    const int64_t to = smaller(PAGE_SIZE, block.high - first);
    if (physical < 0 || from >= to) {
      ++walk.at;
      walk.slot = 0;
      continue;
    }
    const int64_t until = smaller(to, from + TILE - tile.count);
    add(a, tile, physical * PAGE_SIZE + from, static_cast<int>(until - from));
    walk.slot = until;
    if (until == to) {
      ++walk.at;
      walk.slot = 0;
    }
  }
  for (int k = tile.count; tile.count && k % LANES; ++k) {
    tile.place[k] = INFINITE;
    tile.key[k] = tile.key[0];
    tile.value[k] = tile.value[0];
  }
}

alignas(64) constexpr T NOTHING[VALUE_DIM] = {};

// Gathers the records of the next TILE pages. A page without a part in the read is there with a
// weight of zero; a tile of nothing else is passed over.
void fill_records(const AttendArgs& a, Walk& walk, Tile<T>& tile) {
  tile.count = 0;
  while (!tile.count && walk.record < walk.records) {
    if (walk.record >= walk.known) look_up(walk);
    const uint64_t listed = walk.skip[(walk.record - walk.known + 512) / 64];
    const int count = static_cast<int>(smaller(TILE, walk.records - walk.record));
    bool any = false;
    for (int k = 0; k < TILE; ++k) {
      const int64_t slot = k < count && !(listed >> k & 1) ? walk.table[walk.record + k] : -1;
      tile.place[k] = 0;
      tile.value[k] = NOTHING;
      tile.bias[k] = -INFINITE;
      if (slot < 0) continue;
      tile.value[k] = static_cast<const T*>(a.page_values) + slot * VALUE_DIM;
      tile.bias[k] = a.page_bias[slot];
      any = true;
    }
    tile.page = walk.record;
    tile.count = any ? count : 0;
    walk.record += count;
  }
}

// Gathers the next tile: records first, then keys; an empty one is the end.
void fill(const AttendArgs& a, const Block& block, Walk& walk, Tile<T>& tile) {
  fill_records(a, walk, tile);
  if (!tile.count) fill_keys(a, block, walk, tile);
}

// The query's place among [B, H, n].
int64_t query_number(const AttendArgs& a, const Block& block, int row, int head) {
  const int64_t h = block.kv_head * GROUP + block.head + head;
  return (block.sequence * a.memory.kv_heads * GROUP + h) * a.memory.rows + block.row + row;
}

// Brings keys first .. last - 1 of a tile near, or some of their columns, and their values side by
// side with them: memory gives two sequences at a time faster than one.
MEMCOMPILE_INLINE void fetch(const Tile<T>& tile, int first, int last, int begin = 0,
                             int end = KEY_DIM) {
  for (int k = first; k < last; ++k) {
    if (tile.page < 0) prefetch_l2(tile.key[k], begin, end);
    prefetch_l2(tile.value[k], begin, end);
  }
}

// The products of R queries, the first of which is q, with the means of K pages: they were found
// when pages were ranked.
template <int R>
MEMCOMPILE_INLINE vec page_logits(const AttendArgs& a, const Block& block, int q, int64_t page,
                                  int count) {
  const int64_t pages = a.memory.page_table.count, stride = a.memory.rows * pages;
  const float* from = a.page_logits + query_number(a, block, 0, q) * pages + page;
  return load_rows<R>(from, stride, count);
}

// Reads one tile for R queries, the first of which is q.
template <int R>
MEMCOMPILE_INLINE void read_band(const AttendArgs& a, Block& block, int q, const Tile<T>& tile,
                                 const Tile<T>& next) {
  constexpr int K = LANES / R;
  const int steps = static_cast<int>(divide_up(tile.count, K));
  vec logits[TILE / K];
  vec peak = block.peak[q];

  // [R, Dk] @ [Dk, K] -> [R, K]. The first band fetches half of the next tile, a line here and
  // a line there: many at once keep this tile's own loads waiting, none leave the memory idle.
  for (int s = 0; s < steps; ++s) {
    const auto ahead = [&](int begin, int end) __attribute__((always_inline)) {
      if (q == 0) fetch(next, s * K / 2, (s + 1) * K / 2, begin, end);
    };
    if (tile.page >= 0) {
      logits[s] = page_logits<R>(a, block, q, tile.page + s * K, tile.count - s * K);
      ahead(0, KEY_DIM);
    } else {
      logits[s] = dots<T, KEY_DIM, R>(block.query + q * QUERY_STRIDE, QUERY_STRIDE,
                                      tile.key + s * K, ahead);
    }
    logits[s] = logits[s] * all(a.scale);
    if (tile.page >= 0) {
      const vec bias = load_repeated<K>(tile.bias + s * K);
      logits[s] = select(less(bias, all(-3e38f)), bias, logits[s] + bias);
    }
  }

  // A block is one row, and the tile was cut to what it sees: only what fills up the last vector
  // is seen by none.
  if (tile.count % K) {
    const mask seen = less(load_repeated<K>(tile.place + (steps - 1) * K), all(1));
    logits[steps - 1] = select(seen, logits[steps - 1], all(-INFINITE));
  }

  // Online softmax. A row that has seen nothing yet keeps a peak of -inf.
  for (int s = 0; s < steps; ++s) peak = max(peak, logits[s]);
  peak = largest_by<K>(peak);
  const vec shift = select(less(peak, all(-3e38f)), zero(), peak);
  const vec keep = exp(block.peak[q] - shift);
  alignas(64) Weight weight[R * TILE];
  vec total = block.total[q] * keep, rounded = block.rounded[q] * keep;
  for (int s = 0; s < steps; ++s) {
    const vec p = exp(logits[s] - shift);
    total = total + p;
    rounded = rounded + Mix<T>::pack(p, weight + s * LANES / Mix<T>::KEYS);
  }
  block.peak[q] = peak;
  block.total[q] = total;
  block.rounded[q] = rounded;

  // [R, TILE] @ [TILE, Dv] -> [R, Dv]; the first band fetches the other half.
  float kept[LANES], by_row[R];
  store(kept, keep);
  for (int r = 0; r < R; ++r) by_row[r] = kept[r * K];
  const auto ahead = [&](int k, int column, int columns) __attribute__((always_inline)) {
    if (q) return;
    const int begin = (column * TILE + k * columns) / (2 * VALUE_DIM);
    const int end = (column * TILE + (k + Mix<T>::KEYS) * columns) / (2 * VALUE_DIM);
    fetch(next, TILE / 2 + begin, TILE / 2 + end);
  };
  mix<T, VALUE_DIM, R>(tile, weight, by_row, block.out + q * OUT_STRIDE, OUT_STRIDE, ahead);
}

void read_tile(const AttendArgs& a, Block& block, const Tile<T>& tile, const Tile<T>& next) {
  int q = 0;
  for (; q + 4 <= block.count; q += 4) read_band<4>(a, block, q, tile, next);
}

// Where a query's result goes: to the results, or to the parts that the second phase merges.
struct Part {
  float* out;
  float* lse;

  Part(const AttendArgs& a, const Plan& plan, int64_t query, int64_t split) {
    float* parts = static_cast<float*>(a.memory.scratch);
    const Memory& m = a.memory;
    const int64_t nth = query * plan.splits + split;
    const int64_t all = m.batch * m.kv_heads * GROUP * m.rows * plan.splits;
    out = plan.splits == 1 ? a.out + query * VALUE_DIM : parts + nth * VALUE_DIM;
    lse = plan.splits == 1 ? a.lse + query : parts + all * VALUE_DIM + nth;
  }
};

template <int R>
void finish_band(const AttendArgs& a, const Plan& plan, const Block& block, int q, int64_t split) {
  constexpr int K = LANES / R;
  float peak[LANES], total[LANES], rounded[LANES];
  store(peak, block.peak[q]);
  store(total, sum_by<K>(block.total[q]));
  store(rounded, sum_by<K>(block.rounded[q]));
  for (int r = 0; r < R; ++r) {
    const int i = (q + r) / block.heads, h = (q + r) % block.heads;
    const Part to(a, plan, query_number(a, block, i, h), split);
    const float sum = total[r * K];
    const vec share = all(sum > 0 ? 1 / rounded[r * K] : 0);
    const float* out = block.out + (q + r) * OUT_STRIDE;
    for (int d = 0; d < VALUE_DIM; d += LANES) {
      store(to.out + d, load(out + d) * share, smaller(LANES, VALUE_DIM - d));
    }
    *to.lse = sum > 0 ? peak[r * K] + logf(sum) : -INFINITE;
  }
}

void finish(const AttendArgs& a, const Plan& plan, const Block& block, int64_t split) {
  int q = 0;
  for (; q + 4 <= block.count; q += 4) finish_band<4>(a, plan, block, q, split);
  // Padding rows: nothing was seen.
  const int rows = static_cast<int>(smaller(ROWS, a.memory.rows - block.row));
  for (q = block.count; q < rows * block.heads; ++q) {
    const Part to(a, plan, query_number(a, block, q / block.heads, q % block.heads), split);
    for (int d = 0; d < VALUE_DIM; ++d) to.out[d] = 0;
    *to.lse = -INFINITE;
  }
}

// Phase 1: item = (sequence, KV head, block, split).
int64_t read_items(const void* args) {
  const AttendArgs& a = *static_cast<const AttendArgs*>(args);
  const Plan plan(a);
  return a.memory.batch * a.memory.kv_heads * plan.blocks * plan.splits;
}

void read(const void* args, int64_t item, int64_t end) {
  const AttendArgs& a = *static_cast<const AttendArgs*>(args);
  const Memory& m = a.memory;
  const Plan plan(a);
  Block block;
  Tile<T> tiles[2] = {};
  for (; item < end; ++item) {
    const int64_t split = item % plan.splits, nth = item / plan.splits % plan.blocks;
    const int64_t pair = item / plan.splits / plan.blocks;
    block.sequence = pair / m.kv_heads;
    block.kv_head = pair % m.kv_heads;
    block.row = nth / CHUNKS * ROWS;
    block.head = nth % CHUNKS * HEADS;
    block.heads = static_cast<int>(smaller(HEADS, GROUP - block.head));
    read_queries(a, block);

    Walk walk{};
    const PageIds& table = m.page_table;
    walk.table = table.data + block.sequence * table.batch_stride +
                 block.kv_head * table.head_stride;
    walk.list = a.pages.data + block.sequence * a.pages.batch_stride +
                block.kv_head * a.pages.head_stride + block.row * a.pages.row_stride;
    walk.listed = a.pages.count;
    walk.at = block.count ? walk.listed * split / plan.splits : 0;
    walk.end = block.count ? walk.listed * (split + 1) / plan.splits : 0;
    // A record is seen from its page's last token on.
    const int64_t full = block.count ? smaller(table.count, block.high / PAGE_SIZE) : 0;
    walk.record = walk.known = full * split / plan.splits;
    walk.records = full * (split + 1) / plan.splits;

    int now = 0;
    fill(a, block, walk, tiles[0]);
    fetch(tiles[0], 0, tiles[0].count);
    for (; tiles[now].count; now = 1 - now) {
      fill(a, block, walk, tiles[1 - now]);
      read_tile(a, block, tiles[now], tiles[1 - now]);
    }
    finish(a, plan, block, split);
  }
}

// Phase 2: item = query; merges the parts of its splits, if there are any.
int64_t merge_items(const void* args) {
  const AttendArgs& a = *static_cast<const AttendArgs*>(args);
  const Memory& m = a.memory;
  return Plan(a).splits == 1 ? 0 : m.batch * m.kv_heads * GROUP * m.rows;
}

void merge(const void* args, int64_t query, int64_t end) {
  const AttendArgs& a = *static_cast<const AttendArgs*>(args);
  const Plan plan(a);
  for (; query < end; ++query) {
    const Part parts(a, plan, query, 0);
    float peak = -INFINITE, total = 0;
    for (int64_t s = 0; s < plan.splits; ++s) {
      if (parts.lse[s] > peak) peak = parts.lse[s];
    }
    float* out = a.out + query * VALUE_DIM;
    for (int d = 0; d < VALUE_DIM; ++d) out[d] = 0;
    for (int64_t s = 0; s < plan.splits; ++s) {
      if (parts.lse[s] == -INFINITE) continue;
      total += expf(parts.lse[s] - peak);
    }
    for (int64_t s = 0; s < plan.splits; ++s) {
      if (parts.lse[s] == -INFINITE) continue;
      const float share = expf(parts.lse[s] - peak) / total;
      for (int d = 0; d < VALUE_DIM; ++d) out[d] += share * parts.out[s * VALUE_DIM + d];
    }
    a.lse[query] = total > 0 ? peak + logf(total) : -INFINITE;
  }
}

int64_t scratch_bytes(const void* args) {
  const AttendArgs& a = *static_cast<const AttendArgs*>(args);
  const int64_t splits = Plan(a).splits;
  if (splits == 1) return 0;
  return merge_items(args) * splits * (VALUE_DIM + 1) * static_cast<int64_t>(sizeof(float));
}

constexpr Phase PHASES[] = {
    {read_items, read},
    {merge_items, merge},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "attend_bf16_k128_v128_g4_p64_listed_summaries",
    scratch_bytes, PHASES);
