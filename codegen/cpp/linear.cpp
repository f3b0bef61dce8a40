// output[m][o] = sum_i input[m][i] * weight[o][i] + bias[o], for few rows m.
//
// What costs is reading the weights once, so each thread reads its rows in the order of memory. For
// one and two input rows that is one weight row after the other. For more, several weight rows go
// side by side: their operands are loaded once for R weight rows times M input rows. The hardware
// does not foresee that order, so what comes next is prefetched, in the order of memory again.
//
// Input rows come in tiles of up to TILE, packed so that one step reads a tile's operands in a row.
// Where there are several tiles, ROWS weight rows are brought near by the first and read by all.
#include "memcompile/linear.h"
#include "memcompile/simd.h"

namespace {

using namespace memcompile;

constexpr int TILE = LANES == 16 ? 8 : 4;    // input rows
constexpr int SUMS = LANES == 16 ? 24 : 12;  // of 32, or 16, vector registers
constexpr int64_t ROWS = 48;                 // a multiple of all R

const LinearArgs& given(const void* args) { return *static_cast<const LinearArgs*>(args); }

int64_t tiles(const LinearArgs& a) { return divide_up(a.rows, TILE); }

// The first input row of a tile; all tiles have M rows, or one less.
int64_t tile_begin(const LinearArgs& a, int64_t t) { return a.rows * t / tiles(a); }

// One row of bfloat16 is read where it lies; others are packed: [in / WIDTH][tile rows][WIDTH].
template <class T>
bool packed(const LinearArgs& a) {
  return a.rows > 1 || !__is_same(T, typename Dot<T>::Stored);
}

template <class T>
int64_t packed_row(const LinearArgs& a) {
  return divide_up(a.in, Dot<T>::WIDTH) * Dot<T>::WIDTH;
}

template <class T>
int64_t scratch(const LinearArgs& a) {
  return packed<T>(a) ? a.rows * packed_row<T>(a) * int64_t{sizeof(typename Dot<T>::Stored)} : 0;
}

template <class T>
void pack(const LinearArgs& a, int64_t tile) {
  using D = Dot<T>;
  using Stored = typename D::Stored;
  const int64_t begin = tile_begin(a, tile), count = tile_begin(a, tile + 1) - begin;
  const T* input = static_cast<const T*>(a.input) + begin * a.in;
  Stored* to = static_cast<Stored*>(a.scratch) + begin * packed_row<T>(a);
  for (int64_t i = 0; i < a.in; i += D::WIDTH) {
    for (int64_t m = 0; m < count; ++m, to += D::WIDTH) {
      const T* from = input + m * a.in + i;
      for (int j = 0; j < D::WIDTH; j += LANES) {
        store(to + j, load(from + j, static_cast<int>(larger(smaller(LANES, a.in - i - j), 0))));
      }
    }
  }
}

// R weight rows times M input rows: to[m * ROWS + r]. UNROLL steps are summed side by side, so that
// they do not wait for each other. While it is at it, it fetches R rows from `ahead` on.
template <class T, int M, int R, int UNROLL>
MEMCOMPILE_INLINE void dots(const T* const (&weight)[R], const typename Dot<T>::Stored* x,
                            int64_t in, const T* ahead, float* to) {
  using D = Dot<T>;
  constexpr int COUNT = M * R * UNROLL;
  vec sum[COUNT];
#pragma GCC unroll 32
  for (int j = 0; j < COUNT; ++j) sum[j] = zero();
  const auto step = [&](int64_t i, int u, int n) __attribute__((always_inline)) {
    typename D::Operand w[R];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(ahead + R * i + r * D::WIDTH, 0, 2);
      w[r] = D::load(weight[r] + i, n);
    }
#pragma GCC unroll 32
    for (int m = 0; m < M; ++m) {
      const auto operand = D::load(x + i * M + m * D::WIDTH, M > 1 ? D::WIDTH : n);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        vec& s = sum[(u * M + m) * R + r];
        s = D::add(s, w[r], operand);
      }
    }
  };
  int64_t i = 0;
  for (; i + UNROLL * D::WIDTH <= in; i += UNROLL * D::WIDTH) {
#pragma GCC unroll 32
    for (int u = 0; u < UNROLL; ++u) step(i + u * D::WIDTH, u, D::WIDTH);
  }
  for (; i < in; i += D::WIDTH) step(i, 0, static_cast<int>(smaller(D::WIDTH, in - i)));
#pragma GCC unroll 32
  for (int j = M * R; j < COUNT; ++j) sum[j % (M * R)] = sum[j % (M * R)] + sum[j];
  if constexpr (M * R <= 2) {
    for (int j = 0; j < M * R; ++j) to[j * ROWS] = memcompile::sum(sum[j]);
    return;
  }
#pragma GCC unroll 4
  for (int j = 0; j < M * R; j += LANES) {
    vec some[LANES];
    float each[LANES];
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) some[l] = j + l < M * R ? sum[(j + l) % COUNT] : zero();
    store(each, sums(some));
#pragma GCC unroll 16
    for (int l = 0; l < LANES; ++l) {
      if (j + l < M * R) to[(j + l) / R * ROWS + (j + l) % R] = each[l];
    }
  }
}

// Weight rows begin .. end - 1, ROWS of them at most, times one tile of M input rows.
template <class T, int M>
void rows_by_tile(const LinearArgs& a, int64_t begin, int64_t end, int64_t tile) {
  constexpr int R = M <= 2 ? 1 : SUMS / M, UNROLL = M <= 2 ? 4 : 1;
  static_assert(ROWS % R == 0);
  using Stored = typename Dot<T>::Stored;
  const int64_t first = tile_begin(a, tile);
  const T* weight = static_cast<const T*>(a.weight);
  const Stored* x = packed<T>(a) ? static_cast<const Stored*>(a.scratch) + first * packed_row<T>(a)
                                 : static_cast<const Stored*>(a.input);
  const int64_t ahead = (R == 1 ? 0 : R * a.in) + (R == 1 ? 4096 : 2048) / int64_t{sizeof(T)};
  alignas(64) float sums[M * ROWS];
  for (int64_t o = begin; o < end; o += R) {
    const T* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = weight + smaller(o + r, end - 1) * a.in;
    dots<T, M, R, UNROLL>(rows, x, a.in, weight + o * a.in + ahead, sums + (o - begin));
  }
  for (int m = 0; m < M; ++m) {
    T* output = static_cast<T*>(a.output) + (first + m) * a.out;
    for (int64_t o = begin; o < end; o += LANES) {
      const int n = static_cast<int>(smaller(LANES, end - o));
      vec v = load(sums + m * ROWS + (o - begin), n);
      if (a.bias) v = v + load(static_cast<const T*>(a.bias) + o, n);
      store(output + o, v, n);
    }
  }
}

using ByTile = void (*)(const LinearArgs&, int64_t begin, int64_t end, int64_t tile);

template <class T>
void some_rows(const LinearArgs& a, int64_t begin, int64_t end) {
  static constexpr ByTile BY_COUNT[] = {
      nullptr,
      rows_by_tile<T, 1>,
      rows_by_tile<T, 2>,
      rows_by_tile<T, 3>,
      rows_by_tile<T, 4>,
#if defined(__AVX512F__)
      rows_by_tile<T, 5>,
      rows_by_tile<T, 6>,
      rows_by_tile<T, 7>,
      rows_by_tile<T, 8>,
#endif
  };
  for (int64_t t = 0; t < tiles(a); ++t) {
    BY_COUNT[tile_begin(a, t + 1) - tile_begin(a, t)](a, begin, end, t);
  }
}

template <class F>
auto by_type(const LinearArgs& a, F&& f) {
  switch (a.type) {
    case Type::f32:
      return f(float{});
    case Type::f16:
      return f(f16{});
    default:
      return f(bf16{});
  }
}

int64_t scratch_bytes(const void* args) {
  return by_type(given(args), [&](auto t) { return scratch<decltype(t)>(given(args)); });
}

// Phase 1: items are tiles of input rows.
int64_t tiles_to_pack(const void* args) { return scratch_bytes(args) ? tiles(given(args)) : 0; }

void pack_tiles(const void* args, int64_t begin, int64_t end) {
  by_type(given(args), [&](auto t) {
    for (int64_t i = begin; i < end; ++i) pack<decltype(t)>(given(args), i);
  });
}

// Phase 2: items are ITEM weight rows each. A thread's are best neighbours: memory is read in order.
constexpr int64_t ITEM = 8;

int64_t items(const void* args) { return divide_up(given(args).out, ITEM); }

void multiply(const void* args, int64_t begin, int64_t end) {
  const LinearArgs& a = given(args);
  const int64_t stop = smaller(end * ITEM, a.out);
  by_type(a, [&](auto t) {
    for (int64_t o = begin * ITEM; o < stop; o += ROWS) {
      some_rows<decltype(t)>(a, o, smaller(o + ROWS, stop));
    }
  });
}

constexpr Phase PHASES[] = {{tiles_to_pack, pack_tiles}, {items, multiply}};

}  // namespace

MEMCOMPILE_KERNEL("linear", scratch_bytes, PHASES);
