// What a generated kernel and the runtime know of each other. No torch header is read here, so that
// a kernel compiles in about a second.
//
// A kernel is a list of phases. The runtime checks the tensors, allocates results and scratch, and
// runs each phase's items over all threads, one phase after the other.
#pragma once

#include <cstdint>

namespace memcompile {

// A tensor [B, heads, n, D] whose last axis is contiguous; strides in elements.
struct Rows {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

// An int32 tensor [B, Hkv, pages], or [B, Hkv, n, S] where row_stride is not 0; last axis contiguous.
struct PageIds {
  const int32_t* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t count;  // extent of the last axis
};

// What every operation on a paged memory is given.
struct Memory {
  int64_t batch;
  int64_t kv_heads;
  int64_t rows;             // n
  int64_t pool_pages;       // P: physical pages of every pool
  PageIds page_table;       // [B, Hkv, pages], -1 where no page is assigned
  const int32_t* position;  // [B]
  const int32_t* lengths;   // [B]
  void* scratch;            // scratch_bytes(args, threads), aligned to 64; phases share it
  int64_t threads;
};

struct AppendIndexArgs {
  Memory memory;
  Rows key;            // [B, Hkv, n, Dk]
  Rows value;          // [B, Hkv, n, Dv]; absent when shared_kv
  PageIds record_table;  // [B, Hkv, columns]; absent where records lie beside their pages
  void* key_pages;     // [P, page_size, Dk], contiguous
  void* value_pages;   // [P, page_size, Dv], contiguous; absent when shared_kv
  void* const* index;  // one [P, width] a field, contiguous, in the order of the spec's fields;
                       // with a table of their own [R, width]
};

struct FoldArgs {
  Memory memory;                // its page_table and pools are the groups'; of no rows
  PageIds child_table;          // [B, Hkv, columns]
  int64_t child_rows;           // of every pool of children
  const void* const* children;  // one [rows, width] a field, contiguous, in the order of the fields
  void* const* index;           // the same of the groups
  int64_t child_size;           // tokens
  int64_t ratio;                // children of a group
};

struct ScoreSelectArgs {
  Memory memory;
  Rows query;                // [B, H, n, Dk]
  const void* const* index;  // one [P, width] a field, contiguous, in the order of the score's fields
  PageIds candidates;        // [B, Hkv, n, S]; absent where every page is one
  int64_t sink_pages;
  int64_t window_pages;
  int64_t capacity;
  int64_t budget_pages;
  int64_t dense_below;
  int32_t* pages;      // out [B, Hkv, n, capacity], contiguous
  float* page_logits;  // out [B, H, n, pages], contiguous; absent unless asked for
};

struct AttendArgs {
  Memory memory;
  Rows query;               // [B, H, n, Dk]
  const void* key_pages;    // [P, page_size, Dk], contiguous
  const void* value_pages;  // [P, page_size, Dv], contiguous; absent when shared_kv
  const float* bias;        // [P, page_size], contiguous; absent without bias
  PageIds pages;            // [B, Hkv, n, S]; absent when all pages are read
  const float* page_logits;  // of summaries: [B, H, n, pages], contiguous,
  const void* page_values;   // [P, Dv], contiguous,
  const float* page_bias;    // and [P]; absent without them
  float scale;
  float softcap;
  int64_t window;
  float* out;       // [B, H, n, Dv], contiguous
  float* lse;       // [B, H, n], contiguous
  float* page_lse;  // [B, H, n, S] of a list to read, else [B, H, n, pages]; absent unless asked for
};

struct CombineArgs {
  int64_t rows;              // B * H * n
  const float* const* outs;  // count of [rows, Dv], contiguous
  const float* const* lses;  // count of [rows], contiguous
  float* out;
  float* lse;
  int64_t threads;
};

// state_step and state_chunk, or the gradients of the latter. Of memory, rows and lengths count.
struct StateArgs {
  Memory memory;
  Rows query;          // [B, H, n, m]
  Rows key;            // [B, Hkv, n, m]
  Rows value;          // [B, Hkv, n, Dv]
  const float* decay;  // logarithms [Hkv] or [B, Hkv, n], contiguous; absent without decay
  const float* beta;   // [B, Hkv, n], contiguous; absent without the delta rule
  float* state;        // [B, Hkv, m, Dv], contiguous,
  float* norm;         // and [B, Hkv, m]; absent unless normalised
  float* out;          // [B, H, n, Dv], contiguous
  float* lse;          // [B, H, n], contiguous
  Rows grad_num;          // of gradients: float [B, H, n, Dv],
  const float* grad_den;  // [B, H, n], contiguous; absent unless normalised,
  float* grad_query;      // and results, as what they are of, contiguous
  float* grad_key;
  float* grad_value;
  float* grad_decay;
};

struct Phase {
  int64_t (*items)(const void* args);
  void (*run)(const void* args, int64_t begin, int64_t end);  // items begin .. end - 1
};

// One instruction set's code of one kernel.
struct Kernel {
  const char* name;  // KernelSpec.name
  const char* isa;   // avx512_bf16, avx512, avx2 or portable
  int64_t (*scratch_bytes)(const void* args);
  int64_t phases;
  const Phase* phase;
};

enum class Op : int32_t { append_index, score_select, attend, combine, state_step, state_chunk };
enum class Type : int32_t { f32, f16, bf16 };

struct Field {
  const char* name;
  Type type;
  int64_t width;
};

// KernelSpec, as far as the runtime checks tensors and allocates results by it.
struct Spec {
  const char* name;
  Op op;
  Type type;
  int64_t key_dim;
  int64_t value_dim;
  bool shared_kv;
  int64_t group;
  int64_t page_size;
  bool by_slot;     // attend's pages begin at any slot
  bool list;        // attend takes a list of pages:
  bool exclude;     // to leave out
  bool bias;
  bool softcap;
  bool window;
  bool page_lse;
  bool summaries;    // attend reads pages that are not listed by their records
  bool page_logits;  // score_select returns what summaries need,
  bool among;        // or chooses from each row's candidates
  bool record_table;  // append_index writes records to rows of a table of their own,
  bool fold;          // or records of records alone
  int64_t fields;
  const Field* field;  // the index fields written or read, in the order of the arguments
  int64_t count;       // reads that combine merges
  bool decay;          // a state decays: each KV head by a constant,
  bool gate;           // or each row by its own
  bool delta;
  bool normalised;
  bool backward;  // state_chunk returns gradients
};

// Every variant of one kernel, the best instruction set first.
struct Variants {
  Spec spec;
  int64_t count;
  const Kernel* const* kernel;
};

}  // namespace memcompile

// A kernel's file ends with MEMCOMPILE_KERNEL("name", scratch_bytes, array_of_phases). It is
// compiled once for each instruction set, with MEMCOMPILE_ISA set to its name; all else in the file
// has internal linkage.
#define MEMCOMPILE_TEXT_(x) #x
#define MEMCOMPILE_TEXT(x) MEMCOMPILE_TEXT_(x)
#define MEMCOMPILE_JOIN_(a, b) a##b
#define MEMCOMPILE_JOIN(a, b) MEMCOMPILE_JOIN_(a, b)
#define MEMCOMPILE_KERNEL(name, scratch_bytes, array)                                  \
  extern "C" __attribute__((visibility("hidden"))) const memcompile::Kernel            \
      MEMCOMPILE_JOIN(memcompile_kernel_, MEMCOMPILE_ISA);                             \
  const memcompile::Kernel MEMCOMPILE_JOIN(memcompile_kernel_, MEMCOMPILE_ISA) = {     \
      name, MEMCOMPILE_TEXT(MEMCOMPILE_ISA), scratch_bytes, sizeof(array) / sizeof(*array), array}

// The runtime library's: registers an operator's implementation for CPU tensors. The variants must
// outlive the process's last call.
extern "C" void memcompile_register(const memcompile::Variants* variants);
