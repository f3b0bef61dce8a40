// combine_f32_v128_x2
//
//   lse = log sum over reads i of exp(lse_i),  out = sum over reads i of exp(lse_i - lse) * out_i
#include <math.h>

#include "memcompile/kernel.h"
#include "memcompile/simd.h"

namespace {

using namespace memcompile;

constexpr int VALUE_DIM = 128;
constexpr int COUNT = 2;
constexpr int64_t ROWS = 64;  // of an item

int64_t combine_items(const void* args) {
  return divide_up(static_cast<const CombineArgs*>(args)->rows, ROWS);
}

void combine(const void* args, int64_t item, int64_t end) {
  const CombineArgs& a = *static_cast<const CombineArgs*>(args);
  for (int64_t row = item * ROWS; row < smaller(end * ROWS, a.rows); ++row) {
    float peak = -INFINITE, share[COUNT], total = 0;
    for (int i = 0; i < COUNT; ++i) peak = a.lses[i][row] > peak ? a.lses[i][row] : peak;
    for (int i = 0; i < COUNT; ++i) {
      share[i] = a.lses[i][row] == -INFINITE ? 0 : expf(a.lses[i][row] - peak);
      total += share[i];
    }
    // A row that no read has seen: 0, -inf.
    const float scale = total > 0 ? 1 / total : 0;
    for (int d = 0; d < VALUE_DIM; d += LANES) {
      const int some = smaller(LANES, VALUE_DIM - d);
      vec sum = zero();
      for (int i = 0; i < COUNT; ++i) {
        sum = fma(all(share[i] * scale), load(a.outs[i] + row * VALUE_DIM + d, some), sum);
      }
      store(a.out + row * VALUE_DIM + d, sum, some);
    }
    a.lse[row] = total > 0 ? peak + logf(total) : -INFINITE;
  }
}

int64_t scratch_bytes(const void*) { return 0; }

constexpr Phase PHASES[] = {
    {combine_items, combine},
};

}  // namespace

MEMCOMPILE_KERNEL(
    "combine_f32_v128_x2",
    scratch_bytes, PHASES);
