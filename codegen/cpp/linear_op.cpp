// memcompile_cpp::linear: the semantics of at::linear; few rows take the kernel in linear.cpp.
#include <torch/library.h>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <optional>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "memcompile/linear.h"

// The runtime library's: whether this machine runs variants of that instruction set.
extern "C" int memcompile_can_run(const char* isa);

#if defined(__x86_64__)
extern "C" const memcompile::Kernel memcompile_kernel_avx512_bf16, memcompile_kernel_avx512,
    memcompile_kernel_avx2;
#endif
extern "C" const memcompile::Kernel memcompile_kernel_portable;

namespace memcompile {
namespace {

const Kernel* choose() {
  const Kernel* const variants[] = {
#if defined(__x86_64__)
      &memcompile_kernel_avx512_bf16, &memcompile_kernel_avx512, &memcompile_kernel_avx2,
#endif
      &memcompile_kernel_portable};
  const char* wanted = std::getenv("MEMCOMPILE_ISA");
  for (const Kernel* kernel : variants) {
    if (!memcompile_can_run(kernel->isa)) continue;
    if (!wanted || !*wanted || !strcmp(wanted, kernel->isa)) return kernel;
  }
  TORCH_CHECK_VALUE(false, "MEMCOMPILE_ISA=", wanted, " is not an instruction set of this machine");
}

std::optional<Type> type_of(at::ScalarType type) {
  if (type == at::kFloat) return Type::f32;
  if (type == at::kHalf) return Type::f16;
  if (type == at::kBFloat16) return Type::bf16;
  return std::nullopt;
}

// Bits of CPUID's leaf 7: matrix units, and arithmetic in float16. at::linear uses both.
bool has(int bit) {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> bit & 1);
#else
  return false;
#endif
}

// The most rows that the kernel is given; at::linear is the faster one beyond, or not slower.
// Measured on Zen 4 by instruction set (at::linear repacks bfloat16 weights in each call, and has
// no float16 kernel for many rows there); a guess on the low side where there are matrix units.
int64_t most_rows(Type type, const Kernel& kernel) {
  constexpr int AVX512_FP16 = 23, AMX_BF16 = 22;
  static const bool amx = has(AMX_BF16), fp16 = has(AVX512_FP16);
  if (!strcmp(kernel.isa, "portable")) return 8;
  if (type == Type::f32) return 256;
  if (type == Type::f16) return fp16 ? 16 : INT64_MAX;
  return amx ? 16 : strcmp(kernel.isa, "avx512_bf16") ? INT64_MAX : 128;
}

void run(const Kernel& kernel, const LinearArgs& args) {
  for (int64_t p = 0; p < kernel.phases; ++p) {
    const Phase& phase = kernel.phase[p];
    const int64_t items = phase.items(&args);
    if (items <= 1 || args.threads <= 1) {
      if (items > 0) phase.run(&args, 0, items);
      continue;
    }
    at::parallel_for(0, items, (items + args.threads - 1) / args.threads, [&](int64_t begin, int64_t end) {
      phase.run(&args, begin, end);
    });
  }
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias) {
  static const Kernel* const kernel = choose();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const std::optional<Type> type = type_of(weight.scalar_type());
  const bool fits = type && weight.dim() == 2 && weight.is_contiguous() && weight.numel() &&
                    input.dim() >= 1 && input.size(-1) == weight.size(1) &&
                    input.scalar_type() == weight.scalar_type() && input.numel() &&
                    input.is_cpu() && weight.is_cpu();
  const bool plain = !bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) &&
                               bias->scalar_type() == weight.scalar_type() && bias->is_cpu());
  LinearArgs args{};
  if (fits) args.rows = input.numel() / weight.size(1);
  if (!fits || !plain || args.rows > most_rows(*type, *kernel)) {
    return at::linear(input, weight, bias);  // whatever is wrong with the call, it says
  }
  const at::Tensor rows = input.contiguous();
  const at::Tensor added = bias ? bias->contiguous() : at::Tensor();
  at::DimVector sizes(input.sizes());
  sizes.back() = weight.size(0);
  at::Tensor output = at::empty(sizes, weight.options());
  args.type = *type;
  args.input = rows.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.bias = bias ? added.const_data_ptr() : nullptr;
  args.output = output.mutable_data_ptr();
  args.in = weight.size(1);
  args.out = weight.size(0);
  // A thread costs about what reading 16 KB does.
  const int64_t work = args.in * args.out * weight.element_size() >> 14;
  args.threads = std::clamp<int64_t>(work, 1, at::get_num_threads());
  at::Tensor scratch;
  if (const int64_t bytes = kernel->scratch_bytes(&args)) {
    scratch = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
    args.scratch = scratch.mutable_data_ptr();
  }
  run(*kernel, args);
  return output;
}

}  // namespace
}  // namespace memcompile

TORCH_LIBRARY_IMPL(memcompile_cpp, CPU, m) {
  m.impl("linear", TORCH_FN(memcompile::linear));
}
