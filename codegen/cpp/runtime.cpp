// Makes operators of kernels: the only file that reads torch's headers, built once per torch.
//
// Every kernel library hands its variants over when it is loaded. The best one this machine can run
// becomes the implementation for CPU tensors of memcompile_cpp::<name>; whoever loads the library
// defines the operator itself.
#include <torch/library.h>

#include <ATen/Parallel.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memcompile/kernel.h"
#include "memcompile/results.h"

namespace memcompile {
namespace {

constexpr const char* NAMESPACE = "memcompile_cpp";

at::ScalarType scalar_type(Type type) {
  switch (type) {
    case Type::f32:
      return at::kFloat;
    case Type::f16:
      return at::kHalf;
    default:
      return at::kBFloat16;
  }
}

bool can_run(const char* isa) {
#if defined(__x86_64__)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (!strcmp(isa, "avx512_bf16")) return avx2 && avx512 && __builtin_cpu_supports("avx512bf16");
  if (!strcmp(isa, "avx512")) return avx2 && avx512;
  if (!strcmp(isa, "avx2")) return avx2;
#endif
  return !strcmp(isa, "portable");
}

const Kernel* choose(const Variants& variants) {
  const char* wanted = std::getenv("MEMCOMPILE_ISA");
  std::string known;
  for (int64_t i = 0; i < variants.count; ++i) {
    const Kernel* kernel = variants.kernel[i];
    if (!can_run(kernel->isa)) continue;
    if (!wanted || !*wanted || !strcmp(wanted, kernel->isa)) return kernel;
    known += std::string(known.empty() ? "" : ", ") + kernel->isa;
  }
  TORCH_CHECK_VALUE(!wanted, "MEMCOMPILE_ISA=", wanted, " is not an instruction set of this machine ",
                    "that ", variants.spec.name, " was built for; these are: ", known);
  TORCH_CHECK_NOT_IMPLEMENTED(false, variants.spec.name, ": no variant runs on this machine");
}

// A result of floats that a kernel will fill.
at::Tensor result(at::IntArrayRef sizes) {
  const auto options = at::TensorOptions().dtype(at::kFloat);
  size_t bytes = sizeof(float);
  for (const int64_t size : sizes) bytes *= size;
  if (bytes < Results::SMALLEST) return at::empty(sizes, options);
  void* data = results().take(bytes);
  TORCH_CHECK(data, "no memory for a result of ", bytes, " bytes");
  return at::from_blob(data, sizes, [bytes](void* p) { results().give(p, bytes); }, options);
}

// Scratch memory of the calling thread, which only grows.
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> held;
  static thread_local int64_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    held.reset(std::aligned_alloc(64, size));
    TORCH_CHECK(held, "no memory for ", size, " bytes of scratch");
  }
  return held.get();
}

class Operator final : public c10::OperatorKernel {
 public:
  explicit Operator(const Variants* variants) : spec_(variants->spec), variants_(variants) {}

  void operator()(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
    if (!kernel_) kernel_ = choose(*variants_);
    switch (spec_.op) {
      case Op::append_index:
        return spec_.fold ? fold(*stack) : append_index(*stack);
      case Op::score_select:
        return score_select(*stack);
      case Op::attend:
        return attend(*stack);
      case Op::combine:
        return combine(*stack);
      case Op::state_step:
      case Op::state_chunk:
        return spec_.backward ? state_backward(*stack) : state(*stack);
    }
  }

 private:
  // Reads a call's arguments one after the other.
  struct Arguments {
    const torch::jit::Stack& stack;
    size_t at;
    const at::Tensor& tensor() { return stack[at++].toTensor(); }
    double real() { return stack[at++].toDouble(); }
    int64_t whole() { return stack[at++].toInt(); }
  };

  Arguments arguments(const torch::jit::Stack& stack, size_t count) const {
    return {stack, stack.size() - count};
  }

  void check(const at::Tensor& t, const char* name, at::ScalarType type) const {
    TORCH_CHECK_TYPE(t.scalar_type() == type, spec_.name, ": ", name, " is ", t.scalar_type(),
                     "; this kernel reads ", type);
    TORCH_CHECK_VALUE(t.is_cpu(), spec_.name, ": ", name, " is on ", t.device(),
                      "; this kernel reads CPU tensors");
  }

  // Sizes of -1 are free.
  void check(const at::Tensor& t, const char* name, at::ScalarType type,
             at::IntArrayRef sizes) const {
    check(t, name, type);
    bool same = t.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) {
      same = sizes[i] < 0 || t.size(static_cast<int64_t>(i)) == sizes[i];
    }
    TORCH_CHECK_VALUE(same, spec_.name, ": ", name, " is ", t.sizes(), "; this call needs ", sizes,
                      " (-1: any)");
  }

  void* pool(const at::Tensor& t, const char* name, at::ScalarType type,
             at::IntArrayRef sizes) const {
    check(t, name, type, sizes);
    TORCH_CHECK_VALUE(t.is_contiguous(), spec_.name, ": ", name, " has strides ", t.strides(),
                      "; pools are contiguous");
    return t.data_ptr();
  }

  // Pages [P, page_size, width], one after the other or, by slot, beginning at every slot.
  void* pages(const at::Tensor& t, const char* name, at::ScalarType type, int64_t count,
              int64_t width) const {
    if (!spec_.by_slot) return pool(t, name, type, {count, spec_.page_size, width});
    check(t, name, type, {count, spec_.page_size, width});
    TORCH_CHECK_VALUE(t.stride(2) == 1 && t.stride(1) == width && (count == 1 || t.stride(0) == width),
                      spec_.name, ": ", name, " has strides ", t.strides(),
                      "; pages that begin at every slot have [", width, ", ", width, ", 1]");
    return t.data_ptr();
  }

  // Copies only where the last axis has gaps; `held` keeps the copy alive.
  Rows rows(const at::Tensor& t, const char* name, at::IntArrayRef sizes, at::Tensor& held) const {
    return rows(t, name, scalar_type(spec_.type), sizes, held);
  }

  Rows rows(const at::Tensor& t, const char* name, at::ScalarType type, at::IntArrayRef sizes,
            at::Tensor& held) const {
    check(t, name, type, sizes);
    const bool ready = t.stride(3) == 1 || t.size(3) == 1;
    if (!ready) held = t.contiguous();
    const at::Tensor& use = ready ? t : held;
    return {use.data_ptr(), use.stride(0), use.stride(1), use.stride(2)};
  }

  PageIds page_ids(const at::Tensor& t, const char* name, at::IntArrayRef sizes,
                   at::Tensor& held) const {
    check(t, name, at::kInt, sizes);
    const int64_t last = t.dim() - 1;
    const bool ready = t.stride(last) == 1 || t.size(last) == 1;
    if (!ready) held = t.contiguous();
    const at::Tensor& use = ready ? t : held;
    return {use.const_data_ptr<int32_t>(), use.stride(0), use.stride(1),
            last == 3 ? use.stride(2) : 0, use.size(last)};
  }

  const int32_t* counters(const at::Tensor& t, const char* name, int64_t batch) const {
    check(t, name, at::kInt, {batch});
    TORCH_CHECK_VALUE(t.is_contiguous(), spec_.name, ": ", name, " must be contiguous");
    return t.const_data_ptr<int32_t>();
  }

  // The tensors that every paged operation is given last.
  struct Held {
    at::Tensor a, b, c, d;
  };

  Memory memory(const at::Tensor& table, const at::Tensor& position, const at::Tensor& lengths,
                int64_t batch, int64_t kv_heads, int64_t rows, int64_t pool_pages,
                at::Tensor& held) const {
    Memory m{};
    m.batch = batch;
    m.kv_heads = kv_heads;
    m.rows = rows;
    m.pool_pages = pool_pages;
    m.page_table = page_ids(table, "page_table", {batch, kv_heads, -1}, held);
    m.position = counters(position, "position", batch);
    m.lengths = counters(lengths, "lengths", batch);
    m.threads = at::get_num_threads();
    return m;
  }

  // One thread's share of a phase's items: those from `next` on are left.
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };

  // Phases follow each other. Within one, every thread begins with a share of its own: items are in
  // the order of the KV heads, so what an operation reads or writes of a head the next one finds in
  // its core's own cache. A thread that is done helps the others, since ragged sequences make items
  // of very different sizes.
  void run(const void* args, int64_t threads) const {
    for (int64_t p = 0; p < kernel_->phases; ++p) {
      const Phase& phase = kernel_->phase[p];
      const int64_t items = phase.items(args);
      if (items <= 1 || threads <= 1) {
        if (items > 0) phase.run(args, 0, items);
        continue;
      }
      const int64_t count = std::min(threads, items);
      std::vector<Share> shares(count);
      for (int64_t t = 0; t < count; ++t) {
        shares[t].next = items * t / count;
        shares[t].end = items * (t + 1) / count;
      }
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (; begin < end; ++begin) {
          for (int64_t t = 0; t < count; ++t) {
            Share& share = shares[(begin + t) % count];
            for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
              phase.run(args, i, i + 1);
            }
          }
        }
      });
    }
  }

  template <class Args>
  void run_with_scratch(Args& args) const {
    args.memory.scratch = scratch(kernel_->scratch_bytes(&args));
    run(&args, args.memory.threads);
  }

  void attend(torch::jit::Stack& stack) const {
    const size_t count = 6 + !spec_.shared_kv + spec_.bias + spec_.list + 3 * spec_.summaries +
                         spec_.softcap + spec_.window;
    Arguments given = arguments(stack, count);
    const at::ScalarType type = scalar_type(spec_.type);
    const at::Tensor& query = given.tensor();
    const at::Tensor& key_pages = given.tensor();
    TORCH_CHECK_VALUE(query.dim() == 4 && key_pages.dim() == 3, spec_.name,
                      ": query must be [B, H, n, ", spec_.key_dim, "] and key_pages [P, ",
                      spec_.page_size, ", ", spec_.key_dim, "]; got ", query.sizes(), " and ",
                      key_pages.sizes());
    const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2);
    const int64_t kv_heads = heads / spec_.group, pool_pages = key_pages.size(0);
    TORCH_CHECK_VALUE(heads % spec_.group == 0, spec_.name, ": ", heads, " query heads; this kernel ",
                      "reads groups of ", spec_.group);
    Held held;
    AttendArgs args{};
    args.query = this->rows(query, "query", {batch, heads, rows, spec_.key_dim}, held.a);
    args.key_pages = pages(key_pages, "key_pages", type, pool_pages, spec_.key_dim);
    if (!spec_.shared_kv) {
      args.value_pages = pages(given.tensor(), "value_pages", type, pool_pages, spec_.value_dim);
    }
    if (spec_.bias) {
      args.bias = static_cast<const float*>(
          pool(given.tensor(), "bias", at::kFloat, {pool_pages, spec_.page_size}));
    }
    const at::Tensor& table = given.tensor();
    if (spec_.list) {
      args.pages = page_ids(given.tensor(), "pages", {batch, kv_heads, rows, -1}, held.c);
    }
    if (spec_.summaries) {
      args.page_logits = static_cast<const float*>(
          pool(given.tensor(), "page_logits", at::kFloat, {batch, heads, rows, table.size(2)}));
      args.page_values = pool(given.tensor(), "page_values", type, {pool_pages, spec_.value_dim});
      args.page_bias = static_cast<const float*>(
          pool(given.tensor(), "page_bias", at::kFloat, {pool_pages, 1}));
    }
    const at::Tensor& position = given.tensor();
    const at::Tensor& lengths = given.tensor();
    args.memory = memory(table, position, lengths, batch, kv_heads, rows, pool_pages, held.b);
    args.scale = static_cast<float>(given.real());
    if (spec_.softcap) args.softcap = static_cast<float>(given.real());
    if (spec_.window) args.window = given.whole();

    const auto options = at::TensorOptions().dtype(at::kFloat);
    at::Tensor out = at::empty({batch, heads, rows, spec_.value_dim}, options);
    at::Tensor lse = at::empty({batch, heads, rows}, options);
    at::Tensor page_lse;
    args.out = out.mutable_data_ptr<float>();
    args.lse = lse.mutable_data_ptr<float>();
    if (spec_.page_lse) {
      const int64_t pages = spec_.list && !spec_.exclude ? args.pages.count : args.memory.page_table.count;
      page_lse = at::empty({batch, heads, rows, pages}, options);
      args.page_lse = page_lse.mutable_data_ptr<float>();
    }
    if (lse.numel()) run_with_scratch(args);
    torch::jit::drop(stack, count);
    torch::jit::push(stack, std::move(out), std::move(lse));
    if (spec_.page_lse) torch::jit::push(stack, std::move(page_lse));
  }

  void combine(torch::jit::Stack& stack) const {
    const size_t count = 2 * static_cast<size_t>(spec_.count);
    Arguments given = arguments(stack, count);
    std::vector<const float*> outs(spec_.count), lses(spec_.count);
    std::vector<at::Tensor> held;
    const auto read = [&](const at::Tensor& t, const char* name, at::IntArrayRef sizes) {
      check(t, name, at::kFloat, sizes);
      if (t.is_contiguous()) return t.const_data_ptr<float>();
      held.push_back(t.contiguous());
      return held.back().const_data_ptr<float>();
    };
    const auto shape = stack[given.at].toTensor().sizes().vec();
    TORCH_CHECK_VALUE(shape.size() == 4 && shape[3] == spec_.value_dim, spec_.name,
                      ": out0 must be [B, H, n, ", spec_.value_dim, "], got ", at::IntArrayRef(shape));
    const at::IntArrayRef rows(shape.data(), 3);
    for (int64_t i = 0; i < spec_.count; ++i) {
      outs[i] = read(given.tensor(), "out", shape);
      lses[i] = read(given.tensor(), "lse", rows);
    }
    const auto options = at::TensorOptions().dtype(at::kFloat);
    at::Tensor out = at::empty(shape, options);
    at::Tensor lse = at::empty(rows, options);
    CombineArgs args{};
    args.rows = lse.numel();
    args.outs = outs.data();
    args.lses = lses.data();
    args.out = out.mutable_data_ptr<float>();
    args.lse = lse.mutable_data_ptr<float>();
    args.threads = at::get_num_threads();
    if (args.rows) run(&args, args.threads);
    torch::jit::drop(stack, count);
    torch::jit::push(stack, std::move(out), std::move(lse));
  }

  void score_select(torch::jit::Stack& stack) const {
    const size_t count = (spec_.among ? 8 : 9) + static_cast<size_t>(spec_.fields);
    Arguments given = arguments(stack, count);
    const at::Tensor& query = given.tensor();
    TORCH_CHECK_VALUE(query.dim() == 4 && query.size(1) % spec_.group == 0, spec_.name,
                      ": query must be [B, H, n, ", spec_.key_dim, "] with groups of ",
                      spec_.group, " heads, got ", query.sizes());
    const int64_t batch = query.size(0), heads = query.size(1), rows = query.size(2);
    const int64_t kv_heads = heads / spec_.group;
    Held held;
    std::vector<const void*> index(spec_.fields);
    ScoreSelectArgs args{};
    args.query = this->rows(query, "query", {batch, heads, rows, spec_.key_dim}, held.a);
    int64_t pool_pages = -1;
    for (int64_t i = 0; i < spec_.fields; ++i) {
      const Field& field = spec_.field[i];
      const at::Tensor& t = given.tensor();
      index[i] = pool(t, field.name, scalar_type(field.type), {pool_pages, field.width});
      pool_pages = t.size(0);
    }
    args.index = index.data();
    const at::Tensor& table = given.tensor();
    if (spec_.among) {
      args.candidates =
          page_ids(given.tensor(), "candidates", {batch, kv_heads, rows, -1}, held.c);
    }
    const at::Tensor& position = given.tensor();
    const at::Tensor& lengths = given.tensor();
    args.memory = memory(table, position, lengths, batch, kv_heads, rows, pool_pages, held.b);
    args.sink_pages = given.whole();
    args.window_pages = given.whole();
    if (!spec_.among) args.capacity = given.whole();
    args.budget_pages = given.whole();
    if (spec_.among) {
      args.capacity = args.budget_pages;
    } else {
      args.dense_below = given.whole();
      check_capacity(args);
    }
    at::Tensor pages =
        at::empty({batch, kv_heads, rows, args.capacity}, at::TensorOptions().dtype(at::kInt));
    args.pages = pages.mutable_data_ptr<int32_t>();
    at::Tensor logits;
    if (spec_.page_logits) {
      logits = at::empty({batch, heads, rows, args.memory.page_table.count},
                         at::TensorOptions().dtype(at::kFloat));
      args.page_logits = logits.mutable_data_ptr<float>();
    }
    if (batch * kv_heads * rows) run_with_scratch(args);
    torch::jit::drop(stack, count);
    torch::jit::push(stack, std::move(pages));
    if (spec_.page_logits) torch::jit::push(stack, std::move(logits));
  }

  // As the reference: every row's list must fit, before anything is written.
  void check_capacity(const ScoreSelectArgs& args) const {
    const Memory& m = args.memory;
    int64_t most = 0;
    for (int64_t b = 0; b < m.batch; ++b) {
      const int64_t live = std::min<int64_t>(m.lengths[b], m.rows);
      for (const int64_t token : {std::min<int64_t>(m.position[b] + live - 1, args.dense_below - 1),
                                  m.position[b] + live - 1}) {
        const int64_t open = token / spec_.page_size;
        const bool all = open < args.budget_pages || token < args.dense_below;
        if (live > 0 && token >= m.position[b] && m.page_table.count) {
          most = std::max(most, all ? open + 1 : args.budget_pages);
        }
      }
    }
    TORCH_CHECK_VALUE(most <= args.capacity, spec_.name, ": ", most,
                      " pages are to be selected into a list of ", args.capacity,
                      "; capacity must hold budget_pages and the pages of dense_below tokens");
  }

  void append_index(torch::jit::Stack& stack) const {
    const size_t pools = spec_.shared_kv ? 1 : 2;
    const size_t count = 3 + 2 * pools + spec_.record_table + static_cast<size_t>(spec_.fields);
    Arguments given = arguments(stack, count);
    const at::ScalarType type = scalar_type(spec_.type);
    const at::Tensor& key = given.tensor();
    TORCH_CHECK_VALUE(key.dim() == 4, spec_.name, ": key must be [B, Hkv, n, ", spec_.key_dim,
                      "], got ", key.sizes());
    const int64_t batch = key.size(0), kv_heads = key.size(1), rows = key.size(2);
    Held held;
    AppendIndexArgs args{};
    args.key = this->rows(key, "key", {batch, kv_heads, rows, spec_.key_dim}, held.a);
    if (!spec_.shared_kv) {
      args.value =
          this->rows(given.tensor(), "value", {batch, kv_heads, rows, spec_.value_dim}, held.c);
    }
    const at::Tensor& table = given.tensor();
    if (spec_.record_table) {
      args.record_table =
          page_ids(given.tensor(), "record_table", {batch, kv_heads, -1}, held.d);
    }
    const at::Tensor& position = given.tensor();
    const at::Tensor& lengths = given.tensor();
    const at::Tensor& key_pages = given.tensor();
    TORCH_CHECK_VALUE(key_pages.dim() == 3, spec_.name, ": key_pages must be [P, ",
                      spec_.page_size, ", ", spec_.key_dim, "], got ", key_pages.sizes());
    const int64_t pool_pages = key_pages.size(0);
    args.key_pages =
        pool(key_pages, "key_pages", type, {pool_pages, spec_.page_size, spec_.key_dim});
    if (!spec_.shared_kv) {
      args.value_pages = pool(given.tensor(), "value_pages", type,
                              {pool_pages, spec_.page_size, spec_.value_dim});
    }
    std::vector<void*> index(spec_.fields);
    const int64_t index_rows = fields(given, spec_.record_table ? -1 : pool_pages, index);
    args.index = index.data();
    args.memory = memory(table, position, lengths, batch, kv_heads, rows, pool_pages, held.b);
    check_reserved(args.memory);
    if (spec_.record_table) {
      check_rows(args.memory, args.record_table, spec_.page_size, 1, index_rows, "record_table");
    }
    if (key.numel()) run_with_scratch(args);
    torch::jit::drop(stack, count);
  }

  // Pools [rows, width] of all fields; rows of -1 are as many as the first has.
  int64_t fields(Arguments& given, int64_t rows, std::vector<void*>& pools) const {
    for (int64_t i = 0; i < spec_.fields; ++i) {
      const Field& field = spec_.field[i];
      const at::Tensor& t = given.tensor();
      pools[i] = pool(t, field.name, scalar_type(field.type), {rows, field.width});
      rows = t.size(0);
    }
    return rows;
  }

  void fold(torch::jit::Stack& stack) const {
    const size_t count = 6 + 2 * static_cast<size_t>(spec_.fields);
    Arguments given = arguments(stack, count);
    std::vector<void*> children(spec_.fields), index(spec_.fields);
    FoldArgs args{};
    args.child_rows = fields(given, -1, children);
    args.children = children.data();
    const at::Tensor& child_table = given.tensor();
    const at::Tensor& table = given.tensor();
    const at::Tensor& position = given.tensor();
    const at::Tensor& lengths = given.tensor();
    const int64_t index_rows = fields(given, -1, index);
    args.index = index.data();
    args.child_size = given.whole();
    args.ratio = given.whole();
    TORCH_CHECK_VALUE(args.child_size > 0 && args.ratio > 0, spec_.name, ": groups of ", args.ratio,
                      " children of ", args.child_size, " tokens; both must be at least 1");
    TORCH_CHECK_VALUE(table.dim() == 3, spec_.name, ": page_table must be [B, Hkv, columns], got ",
                      table.sizes());
    const int64_t batch = table.size(0), kv_heads = table.size(1);
    Held held;
    args.memory = memory(table, position, lengths, batch, kv_heads, 0, index_rows, held.a);
    args.child_table = page_ids(child_table, "child_table", {batch, kv_heads, -1}, held.b);
    const int64_t size = args.child_size * args.ratio;
    check_rows(args.memory, args.memory.page_table, size, 1, index_rows, "page_table");
    check_rows(args.memory, args.child_table, size, args.ratio, args.child_rows, "child_table");
    run(&args, args.memory.threads);
    torch::jit::drop(stack, count);
  }

  // Whatever `size` tokens the call completes has its `each` rows in a table, checked before
  // anything is written.
  void check_rows(const Memory& m, const PageIds& table, int64_t size, int64_t each, int64_t rows,
                  const char* name) const {
    for (int64_t b = 0; b < m.batch; ++b) {
      const int64_t first = m.position[b] / size * each;
      const int64_t stop = (m.position[b] + std::max(0, m.lengths[b])) / size * each;
      for (int64_t h = 0; h < (first < stop ? m.kv_heads : 0); ++h) {
        const int32_t* row = table.data + b * table.batch_stride + h * table.head_stride;
        for (int64_t g = first; g < stop; ++g) {
          TORCH_CHECK_INDEX(g < table.count && row[g] >= 0 && row[g] < rows, spec_.name, ": column ",
                            g, " of sequence ", b, ", KV head ", h, " names no row of ", rows, " in ",
                            name, ", of ", table.count, " columns; reserve the tokens first");
        }
      }
    }
  }

  // Floats in any layout; `held` keeps a copy alive.
  const float* floats(const at::Tensor& t, const char* name, at::IntArrayRef sizes,
                      at::Tensor& held) const {
    check(t, name, at::kFloat, sizes);
    held = t.contiguous();
    return held.const_data_ptr<float>();
  }

  // Query, key, value, decay, beta and lengths; returns [B, H, n].
  std::array<int64_t, 3> state_inputs(Arguments& given, StateArgs& args,
                                      std::array<at::Tensor, 7>& held) const {
    const at::Tensor& query = given.tensor();
    TORCH_CHECK_VALUE(query.dim() == 4 && query.size(1) % spec_.group == 0, spec_.name,
                      ": query must be [B, H, n, ", spec_.key_dim, "] with groups of ",
                      spec_.group, " heads, got ", query.sizes());
    Memory& m = args.memory;
    m.batch = query.size(0);
    m.kv_heads = query.size(1) / spec_.group;
    m.rows = query.size(2);
    m.threads = at::get_num_threads();
    const int64_t heads = query.size(1);
    args.query = rows(query, "query", {m.batch, heads, m.rows, spec_.key_dim}, held[0]);
    args.key = rows(given.tensor(), "key", {m.batch, m.kv_heads, m.rows, spec_.key_dim}, held[1]);
    args.value =
        rows(given.tensor(), "value", {m.batch, m.kv_heads, m.rows, spec_.value_dim}, held[2]);
    if (spec_.gate) {
      args.decay = floats(given.tensor(), "decay", {m.batch, m.kv_heads, m.rows}, held[3]);
    } else if (spec_.decay) {
      args.decay = floats(given.tensor(), "decay", {m.kv_heads}, held[3]);
    }
    if (spec_.delta) {
      args.beta = floats(given.tensor(), "beta", {m.batch, m.kv_heads, m.rows}, held[4]);
    }
    m.lengths = counters(given.tensor(), "lengths", m.batch);
    return {m.batch, heads, m.rows};
  }

  void state(torch::jit::Stack& stack) const {
    const size_t count = 5 + spec_.decay + spec_.delta + spec_.normalised;
    Arguments given = arguments(stack, count);
    std::array<at::Tensor, 7> held;
    StateArgs args{};
    const auto [batch, heads, rows] = state_inputs(given, args, held);
    const int64_t kv_heads = args.memory.kv_heads;
    const auto kept = [&](const char* name, at::IntArrayRef sizes) {
      const at::Tensor& t = given.tensor();
      check(t, name, at::kFloat, sizes);
      TORCH_CHECK_VALUE(t.is_contiguous(), spec_.name, ": ", name, " has strides ", t.strides(),
                        "; it is written in place and must be contiguous");
      return t.mutable_data_ptr<float>();
    };
    args.state = kept("state", {batch, kv_heads, spec_.key_dim, spec_.value_dim});
    if (spec_.normalised) args.norm = kept("norm", {batch, kv_heads, spec_.key_dim});
    const auto options = at::TensorOptions().dtype(at::kFloat);
    at::Tensor out = result({batch, heads, rows, spec_.value_dim});
    at::Tensor lse = at::empty({batch, heads, rows}, options);
    args.out = out.mutable_data_ptr<float>();
    args.lse = lse.mutable_data_ptr<float>();
    if (lse.numel()) run_with_scratch(args);
    torch::jit::drop(stack, count);
    torch::jit::push(stack, std::move(out), std::move(lse));
  }

  void state_backward(torch::jit::Stack& stack) const {
    const size_t count = 5 + spec_.decay + spec_.normalised;
    Arguments given = arguments(stack, count);
    std::array<at::Tensor, 7> held;
    StateArgs args{};
    const auto [batch, heads, rows] = state_inputs(given, args, held);
    const int64_t kv_heads = args.memory.kv_heads;
    args.grad_num = this->rows(given.tensor(), "grad_num", at::kFloat,
                               {batch, heads, rows, spec_.value_dim}, held[5]);
    if (spec_.normalised) {
      args.grad_den = floats(given.tensor(), "grad_den", {batch, heads, rows}, held[6]);
    }
    const auto options = at::TensorOptions().dtype(at::kFloat);
    const auto made = [&](at::IntArrayRef sizes, float*& data) {
      at::Tensor t = at::empty(sizes, options);
      data = t.mutable_data_ptr<float>();
      return t;
    };
    at::Tensor query = made({batch, heads, rows, spec_.key_dim}, args.grad_query);
    at::Tensor key = made({batch, kv_heads, rows, spec_.key_dim}, args.grad_key);
    at::Tensor value = made({batch, kv_heads, rows, spec_.value_dim}, args.grad_value);
    at::Tensor decay = spec_.gate    ? made({batch, kv_heads, rows}, args.grad_decay)
                       : spec_.decay ? made({kv_heads}, args.grad_decay)
                                     : at::empty({0}, options);
    run_with_scratch(args);
    torch::jit::drop(stack, count);
    torch::jit::push(stack, std::move(query), std::move(key), std::move(value), std::move(decay),
                     at::empty({0}, options));
  }

  // Every token to write has a page, checked before anything is written.
  void check_reserved(const Memory& m) const {
    const PageIds& table = m.page_table;
    for (int64_t b = 0; b < m.batch; ++b) {
      const int64_t live = std::min<int64_t>(m.lengths[b], m.rows);
      if (live <= 0) continue;
      const int64_t last = m.position[b] + live - 1;
      TORCH_CHECK_INDEX(last / spec_.page_size < table.count, spec_.name, ": token ", last,
                        " lies beyond the page table of ", table.count, " pages of ",
                        spec_.page_size, "; reserve the tokens first");
      for (int64_t h = 0; h < m.kv_heads; ++h) {
        const int32_t* row = table.data + b * table.batch_stride + h * table.head_stride;
        for (int64_t g = m.position[b] / spec_.page_size; g <= last / spec_.page_size; ++g) {
          TORCH_CHECK_INDEX(row[g] >= 0 && row[g] < m.pool_pages, spec_.name, ": page ", g,
                            " of sequence ", b, ", KV head ", h, " is ", row[g], " in a pool of ",
                            m.pool_pages, " pages; reserve the tokens first");
        }
      }
    }
  }

  const Spec spec_;
  const Variants* variants_;
  const Kernel* kernel_ = nullptr;
};

}  // namespace
}  // namespace memcompile

extern "C" __attribute__((visibility("default"))) void memcompile_register(
    const memcompile::Variants* variants) {
  // Never destroyed: a process may call operators until its very end.
  static auto* held = new std::vector<std::unique_ptr<torch::Library>>();
  static auto* lock = new std::mutex();
  const std::lock_guard<std::mutex> guard(*lock);
  held->push_back(std::make_unique<torch::Library>(torch::Library::IMPL, memcompile::NAMESPACE,
                                                   c10::DispatchKey::CPU, __FILE__, __LINE__));
  held->back()->impl(variants->spec.name, torch::CppFunction::makeFromBoxedFunctor(
                                              std::make_unique<memcompile::Operator>(variants)));
}

// Whether this machine runs variants of that instruction set.
extern "C" __attribute__((visibility("default"))) int memcompile_can_run(const char* isa) {
  return memcompile::can_run(isa);
}
