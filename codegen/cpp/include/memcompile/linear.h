// What the linear kernel and its operator know of each other; no torch header is read here.
#pragma once

#include "memcompile/kernel.h"

namespace memcompile {

// output = input @ weight^T + bias, summed in float32. All matrices are contiguous.
struct LinearArgs {
  Type type;           // of every element
  const void* input;   // [rows, in]
  const void* weight;  // [out, in]
  const void* bias;    // [out], or absent
  void* output;        // [rows, out]
  int64_t rows;
  int64_t in;
  int64_t out;
  int64_t threads;
  void* scratch;  // scratch_bytes(args), aligned to 64
};

}  // namespace memcompile
