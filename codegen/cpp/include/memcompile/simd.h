// A small vector vocabulary with the same names on every instruction set; the compiler's flags
// choose which header is read. A kernel is compiled once for each of them.
//
//   vec                     LANES floats; + - * / work on it
//   mask                    what less() gives and select() takes
//   load(p), load(p, n)     from float, bf16 or f16; n <= LANES elements, the rest 0
//   store(p, v[, n])        to float, bf16 or f16; rounds to nearest, ties to even
//   Dot<T>                  dot products of rows of T with queries, WIDTH elements at a time
//   Mix<T>                  weighted sums of rows of T, KEYS rows at a time
//
// Everything stands in a namespace of the instruction set's own: variants that are linked into one
// library would otherwise share their inline functions, and a machine would meet instructions that
// it lacks. For the same reason kernels do not call templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#define MEMCOMPILE_INLINE static inline __attribute__((always_inline))

namespace memcompile {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

}  // namespace memcompile

#if defined(__AVX512BF16__)
#define MEMCOMPILE_SIMD avx512_bf16
#include "simd_avx512.h"
#elif defined(__AVX512F__)
#define MEMCOMPILE_SIMD avx512
#include "simd_avx512.h"
#elif defined(__AVX2__)
#define MEMCOMPILE_SIMD avx2
#include "simd_avx2.h"
#else
#define MEMCOMPILE_SIMD portable
#include "simd_portable.h"
#endif
#include "simd_common.h"
#if defined(__AVX512BF16__)
#include "simd_avx512_bf16.h"
#endif
