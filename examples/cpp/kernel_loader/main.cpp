// Launches an operator of a folder that `memcompile MODEL --target cuda:sm_90,...` wrote, with the
// CUDA driver alone: no Python, no Triton, no CUDA toolkit. All that it knows of the kernels stands
// in kernels.h, which memcompile generated beside them.
//
//   kernel_loader FOLDER/kernels [OPERATOR] [SIZE=VALUE ...]
//
// Without OPERATOR the first `attend` is taken. Its values are all one, so that what it reads must
// be one, whatever the keys: that is checked. Other operators are launched on zeros.
// Exit codes: 0 done, 1 a CUDA call failed, 2 wrong arguments, 3 no driver, 4 a wrong result.
// Unverified on GPU.
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "targets.h"

namespace {

[[noreturn]] void fail(int code, const std::string& text) {
    std::fprintf(stderr, "kernel_loader: %s\n", text.c_str());
    std::exit(code);
}

// The part of the driver's API that a launch needs, as cuda.h declares it.
using Result = int;
using Device = int;
using Pointer = unsigned long long;
using Handle = void*;  // a context, a module or a function

struct Driver {
    Result (*init)(unsigned);
    Result (*device_count)(int*);
    Result (*device_get)(Device*, int);
    Result (*device_name)(char*, int, Device);
    Result (*device_attribute)(int*, int, Device);
    Result (*retain_context)(Handle*, Device);
    Result (*set_context)(Handle);
    Result (*synchronize)();
    Result (*load_module)(Handle*, const void*);
    Result (*get_function)(Handle*, Handle, const char*);
    Result (*function_attribute)(Handle, int, int);
    Result (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                     Handle, void**, void**);
    Result (*allocate)(Pointer*, size_t);
    Result (*to_device)(Pointer, const void*, size_t);
    Result (*to_host)(void*, Pointer, size_t);
    Result (*on_device)(Pointer, Pointer, size_t);
    Result (*error_text)(Result, const char**);

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (!library) {
            const char* why = dlerror();
            fail(3, std::string("no CUDA driver (") + (why ? why : "libcuda.so.1") +
                        "); nothing was launched");
        }
        auto find = [&](auto& function, const char* name) {
            void* found = dlsym(library, name);
            if (!found) fail(3, std::string("this CUDA driver has no ") + name);
            std::memcpy(&function, &found, sizeof found);
        };
        find(init, "cuInit");
        find(device_count, "cuDeviceGetCount");
        find(device_get, "cuDeviceGet");
        find(device_name, "cuDeviceGetName");
        find(device_attribute, "cuDeviceGetAttribute");
        find(retain_context, "cuDevicePrimaryCtxRetain");
        find(set_context, "cuCtxSetCurrent");
        find(synchronize, "cuCtxSynchronize");
        find(load_module, "cuModuleLoadData");
        find(get_function, "cuModuleGetFunction");
        find(function_attribute, "cuFuncSetAttribute");
        find(launch, "cuLaunchKernel");
        find(allocate, "cuMemAlloc_v2");
        find(to_device, "cuMemcpyHtoD_v2");
        find(to_host, "cuMemcpyDtoH_v2");
        find(on_device, "cuMemcpyDtoD_v2");
        find(error_text, "cuGetErrorString");
    }

    void check(Result result, const char* what) const {
        if (result == 0) return;
        const char* text = nullptr;
        error_text(result, &text);
        fail(1, std::string(what) + ": " + (text ? text : "error " + std::to_string(result)));
    }
};

constexpr int kMajor = 75, kMinor = 76;       // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
constexpr int kDynamicShared = 8;             // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int kSharedWithoutAsking = 48 << 10;

std::vector<char> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail(2, path + ": cannot be read");
    return {std::istreambuf_iterator<char>(file), {}};
}

// --- what runs on which device ---

bool binary_runs(int compiled_for, int device) {
    return compiled_for && compiled_for / 10 == device / 10 && compiled_for <= device;
}

bool assembly_runs(const memc_target& target, int device) {
    // "sm_90a, PTX 8.7": a letter behind the number binds the text to that architecture.
    std::string arch = target.kernels[0].written_for;
    arch = arch.substr(0, arch.find(','));
    bool any_later = !arch.empty() && std::isdigit(static_cast<unsigned char>(arch.back()));
    return target.capability && any_later && target.capability <= device;
}

const memc_target& choose_target(int device) {
    const memc_target* found = nullptr;
    for (const memc_target* target : memc_targets)  // the latest binary that runs there
        if (binary_runs(target->capability, device) &&
            (!found || target->capability > found->capability))
            found = target;
    for (const memc_target* target : memc_targets)  // or else the latest assembly
        if ((!found || !binary_runs(found->capability, device)) && assembly_runs(*target, device) &&
            (!found || target->capability > found->capability))
            found = target;
    if (found) return *found;
    std::string known;
    for (const memc_target* target : memc_targets) known += std::string(" ") + target->name;
    fail(2, "no kernels for compute capability " + std::to_string(device / 10) + "." +
                std::to_string(device % 10) + "; the folder has" + known);
}

Handle load(const Driver& cuda, const memc_kernel& kernel, const std::string& folder, bool binary) {
    Handle module = nullptr, function = nullptr;
    if (binary) {
        std::vector<char> image = read_file(folder + "/" + kernel.binary);
        if (cuda.load_module(&module, image.data()) == 0)
            std::printf("loaded %s\n", kernel.binary);
        else
            module = nullptr;
    }
    if (!module) {
        std::vector<char> text = read_file(folder + "/" + kernel.assembly);
        text.push_back('\0');
        cuda.check(cuda.load_module(&module, text.data()), kernel.assembly);
        std::printf("loaded %s, which the driver translates\n", kernel.assembly);
    }
    cuda.check(cuda.get_function(&function, module, kernel.entry), kernel.entry);
    if (kernel.shared > kSharedWithoutAsking)
        cuda.check(cuda.function_attribute(function, kDynamicShared, kernel.shared), "shared memory");
    return function;
}

// --- sizes and tensors ---

int index_of(const memc_operator& op, const std::string& size) {
    for (int i = 0; i < op.size_count; i++)
        if (size == op.sizes[i]) return i;
    return -1;
}

int tensor_of(const memc_operator& op, const std::string& name) {
    for (int i = 0; i < op.tensor_count; i++)
        if (name == op.tensors[i].name) return i;
    return -1;
}

int item_size(memc_type type) { return type == MEMC_BF16 || type == MEMC_FP16 ? 2 : 4; }

int64_t elements(const memc_tensor& tensor, const int64_t* sizes) {
    int64_t count = 1;
    for (int axis = 0; axis < tensor.axes; axis++) count *= tensor.shape[axis](sizes);
    return count;
}

void store(char* at, memc_type type, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (type == MEMC_BF16) {
        uint16_t half = static_cast<uint16_t>(bits >> 16);  // values here have few digits
        std::memcpy(at, &half, 2);
    } else if (type == MEMC_FP16) {
        int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
        uint32_t half = exponent <= 0 ? 0 : (static_cast<uint32_t>(exponent) << 10) | (bits >> 13 & 1023);
        uint16_t kept = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
        std::memcpy(at, &kept, 2);
    } else if (type == MEMC_FP32) {
        std::memcpy(at, &value, 4);
    } else {
        int32_t whole = std::isnan(value) ? -1 : static_cast<int32_t>(value);
        std::memcpy(at, &whole, 4);
    }
}

// What a tensor holds at the start. Every page of the table has one of the pool's; every sequence is
// as long as its pages; lists name the first pages; values are one, keys and queries are whatever.
float initial(const memc_operator& op, const memc_tensor& tensor, int64_t at, const int64_t* sizes) {
    std::string name = tensor.name;
    bool attends = std::strncmp(op.name, "attend", 6) == 0;
    if (name == "page_table" || name == "child_table" || name == "record_table")
        return static_cast<float>(at);
    if (name == "pages" || name == "candidates") {
        int64_t width = tensor.shape[3](sizes);
        return static_cast<float>(at % width);
    }
    if (name == "lengths") return static_cast<float>(sizes[index_of(op, "rows")]);
    if (name == "position" && attends) {
        const memc_tensor& keys = op.tensors[tensor_of(op, "key_pages")];
        int64_t slots = sizes[index_of(op, "table_pages")] * keys.shape[1](sizes);
        return static_cast<float>(slots - sizes[index_of(op, "rows")]);
    }
    if (attends && (name == "value_pages" || name == "page_values")) return 1;
    if (attends && (name == "query" || name == "key_pages"))
        return static_cast<float>(at * 7919 % 17 - 8) / 16;
    return 0;
}

struct Run {
    const Driver& cuda;
    const memc_target& target;
    const memc_operator& op;
    std::string folder;
    bool binary;
    std::vector<int64_t> sizes;
    std::vector<float> numbers;
    std::vector<Pointer> tensors;

    void allocate(int at) {
        size_t bytes = static_cast<size_t>(elements(op.tensors[at], sizes.data())) *
                       static_cast<size_t>(item_size(op.tensors[at].type));
        cuda.check(cuda.allocate(&tensors[at], std::max<size_t>(bytes, 16)), "cuMemAlloc");
        if (tensors[at] % 16) fail(1, "cuMemAlloc: not at a multiple of 16 bytes");
    }

    template <class Value>
    void fill(int at, Value value) {
        const memc_tensor& tensor = op.tensors[at];
        int64_t count = elements(tensor, sizes.data());
        int item = item_size(tensor.type);
        std::vector<char> host(static_cast<size_t>(count * item));
        for (int64_t i = 0; i < count; i++) store(&host[static_cast<size_t>(i * item)], tensor.type, value(i));
        if (count) cuda.check(cuda.to_device(tensors[at], host.data(), host.size()), "cuMemcpyHtoD");
    }

    void launch(const memc_step& step) {
        const memc_kernel& kernel = target.kernels[step.kernel];
        size_t count = static_cast<size_t>(step.parameter_count + kernel.null_parameters);
        std::vector<uint64_t> values(count, 0);  // room for a pointer, an int32_t or a float
        std::vector<void*> parameters(count);
        for (size_t i = 0; i < count; i++) parameters[i] = &values[i];
        for (int i = 0; i < step.parameter_count; i++) {
            const memc_parameter& parameter = step.parameters[i];
            void* at = parameters[static_cast<size_t>(i)];
            if (parameter.source == MEMC_TENSOR) {
                std::memcpy(at, &tensors[static_cast<size_t>(parameter.at)], sizeof(Pointer));
            } else if (parameter.source == MEMC_NUMBER) {
                std::memcpy(at, &numbers[static_cast<size_t>(parameter.at)], sizeof(float));
            } else {
                int64_t size = parameter.size(sizes.data());
                if (size > INT32_MAX || size < 0 || size % parameter.multiple_of)
                    fail(2, std::string(parameter.name) + " is " + std::to_string(size) +
                                "; the kernel takes 32 bit and multiples of " +
                                std::to_string(parameter.multiple_of));
                int32_t whole = static_cast<int32_t>(size);
                std::memcpy(at, &whole, sizeof whole);
            }
        }
        unsigned grid[3];
        for (int axis = 0; axis < 3; axis++)
            grid[axis] = static_cast<unsigned>(step.grid[axis](sizes.data()));
        Handle function = load(cuda, kernel, folder, binary);
        std::printf("launch %s: grid %u x %u x %u, %d threads, %d bytes of shared memory, %zu parameters\n",
                    kernel.name, grid[0], grid[1], grid[2], kernel.threads, kernel.shared, count);
        cuda.check(cuda.launch(function, grid[0], grid[1], grid[2],
                               static_cast<unsigned>(kernel.threads), 1, 1,
                               static_cast<unsigned>(kernel.shared), nullptr, parameters.data(), nullptr),
                   kernel.name);
    }

    void carry_out(const memc_variant& variant) {
        for (int i = 0; i < variant.step_count; i++) {
            const memc_step& step = variant.steps[i];
            if (step.action == MEMC_ALLOCATE) {
                allocate(step.tensor);
                // What no kernel writes is no number, so that nobody takes it for a result.
                fill(step.tensor, [&](int64_t) { return step.fill ? step.value : NAN; });
            } else if (step.action == MEMC_COPY) {
                size_t bytes = static_cast<size_t>(elements(op.tensors[step.tensor], sizes.data())) *
                               static_cast<size_t>(item_size(op.tensors[step.tensor].type));
                allocate_if_new(step.target);
                cuda.check(cuda.on_device(tensors[static_cast<size_t>(step.target)],
                                          tensors[static_cast<size_t>(step.tensor)], bytes),
                           "cuMemcpyDtoD");
            } else {
                launch(step);
            }
        }
        cuda.check(cuda.synchronize(), "cuCtxSynchronize");
    }

    void allocate_if_new(int at) {
        if (!tensors[static_cast<size_t>(at)]) allocate(at);
    }
};

const memc_operator& choose_operator(const memc_target& target, const std::string& name) {
    for (int i = 0; i < target.operator_count; i++) {
        const memc_operator& op = target.operators[i];
        if (name.empty() ? std::strncmp(op.name, "attend", 6) == 0 : name == op.name) return op;
    }
    std::string known;
    for (int i = 0; i < target.operator_count; i++)
        known += std::string("\n  ") + target.operators[i].name;
    fail(2, "no operator '" + name + "'; known:" + known);
}

// Sizes that are not given: of a small memory, and strides of tensors that lie without gaps.
std::vector<int64_t> choose_sizes(const memc_operator& op, const std::vector<std::string>& given) {
    std::vector<int64_t> sizes(static_cast<size_t>(op.size_count), -1);
    for (const std::string& word : given) {
        size_t equals = word.find('=');
        int at = index_of(op, word.substr(0, equals));
        char* end = nullptr;
        long long value = std::strtoll(word.c_str() + equals + 1, &end, 10);
        if (at < 0 || at >= op.given_count || *end || value < 0) {
            std::string known;
            for (int i = 0; i < op.given_count; i++) known += std::string(" ") + op.sizes[i];
            fail(2, "'" + word + "' is no size of " + op.name + "; known:" + known);
        }
        sizes[static_cast<size_t>(at)] = value;
    }
    auto choose = [&](const char* name, int64_t value) {
        int at = index_of(op, name);
        if (at >= 0 && sizes[static_cast<size_t>(at)] < 0) sizes[static_cast<size_t>(at)] = value;
        return at < 0 ? value : sizes[static_cast<size_t>(at)];
    };
    int64_t programs = choose("batch", 1) * choose("kv_heads", 2);
    choose("rows", 1);
    choose("pool_pages", programs * choose("table_pages", 8));
    for (int i = 0; i < op.given_count; i++)  // a list is as wide as it was compiled for
        for (int64_t width = 1; sizes[static_cast<size_t>(i)] < 0 && width <= 4096; width++) {
            if (std::strcmp(op.sizes[i], "list_pages") && std::strcmp(op.sizes[i], "candidates")) break;
            std::vector<int64_t> tried = sizes;
            tried[static_cast<size_t>(i)] = width;
            op.variants[0].derive(tried.data());
            for (int v = 0; v < op.variant_count; v++)
                if (op.variants[v].holds(tried.data())) sizes = tried;
        }
    for (int i = 0; i < op.argument_count; i++) {
        const memc_tensor& tensor = op.tensors[i];
        if (!tensor.strides[0]) continue;
        int64_t stride = 1;
        const char* axes[] = {"_batch", "_head", "_row"};
        for (int axis = tensor.axes - 1; axis >= 0; axis--) {
            if (axis < 3) choose((std::string(tensor.name) + axes[tensor.axes == 1 ? 1 : axis]).c_str(), stride);
            stride *= std::max<int64_t>(1, tensor.shape[axis](sizes.data()));
        }
    }
    for (int i = 0; i < op.given_count; i++)
        if (sizes[static_cast<size_t>(i)] < 0) sizes[static_cast<size_t>(i)] = 8;
    return sizes;
}

// Whether what was read of values that are all one is one.
bool reads_one(const Run& run) {
    int at = tensor_of(run.op, "out");
    std::vector<float> out(static_cast<size_t>(elements(run.op.tensors[at], run.sizes.data())));
    run.cuda.check(run.cuda.to_host(out.data(), run.tensors[static_cast<size_t>(at)], out.size() * 4),
                   "cuMemcpyDtoH");
    float furthest = 0;
    for (float value : out) furthest = std::isnan(value) ? INFINITY : std::max(furthest, std::fabs(value - 1));
    bool right = furthest < 0.01f;  // rounded weights do not sum to one to the last digit
    std::printf("out: %zu values, at most %g from 1: %s\n", out.size(), static_cast<double>(furthest),
                right ? "right" : "WRONG");
    return right;
}

}  // namespace

int main(int count, char** words) {
    if (count < 2) fail(2, "usage: kernel_loader FOLDER/kernels [OPERATOR] [SIZE=VALUE ...]");
    std::string folder = words[1], name;
    std::vector<std::string> given;
    for (int i = 2; i < count; i++) {
        if (std::strchr(words[i], '=')) given.push_back(words[i]);
        else name = words[i];
    }
    Driver cuda;
    Device device;
    int devices = 0, major = 0, minor = 0;
    Handle context;
    char model[128] = "";
    cuda.check(cuda.init(0), "cuInit");
    cuda.check(cuda.device_count(&devices), "cuDeviceGetCount");
    if (!devices) fail(3, "no CUDA device; nothing was launched");
    cuda.check(cuda.device_get(&device, 0), "cuDeviceGet");
    cuda.check(cuda.device_name(model, sizeof model, device), "cuDeviceGetName");
    cuda.check(cuda.device_attribute(&major, kMajor, device), "cuDeviceGetAttribute");
    cuda.check(cuda.device_attribute(&minor, kMinor, device), "cuDeviceGetAttribute");
    cuda.check(cuda.retain_context(&context, device), "cuDevicePrimaryCtxRetain");
    cuda.check(cuda.set_context(context), "cuCtxSetCurrent");

    int capability = major * 10 + minor;
    const memc_target& target = choose_target(capability);
    const memc_operator& op = choose_operator(target, name);
    std::printf("%s, compute capability %d.%d: kernels for %s\n", model, major, minor, target.name);
    Run run{cuda, target, op, folder + "/" + target.folder, binary_runs(target.capability, capability),
            choose_sizes(op, given), {}, {}};
    run.tensors.resize(static_cast<size_t>(op.tensor_count));
    std::printf("%s:", op.name);
    for (int i = 0; i < op.given_count; i++)
        std::printf(" %s=%lld", op.sizes[i], static_cast<long long>(run.sizes[static_cast<size_t>(i)]));
    std::printf("\n");
    for (int i = 0; i < op.number_count; i++)  // scale; a softcap
        run.numbers.push_back(std::strcmp(op.numbers[i], "scale") ? 30.0f : 0.125f);
    for (int i = 0; i < op.argument_count; i++) {
        run.allocate(i);
        run.fill(i, [&](int64_t at) { return initial(op, op.tensors[i], at, run.sizes.data()); });
    }
    for (int i = 0; i < op.variant_count; i++) {
        op.variants[i].derive(run.sizes.data());
        if (!op.variants[i].holds(run.sizes.data())) continue;
        run.carry_out(op.variants[i]);
        bool attends = std::strncmp(op.name, "attend", 6) == 0;
        return attends && !reads_one(run) ? 4 : 0;
    }
    fail(2, "no variant of the operator is for these sizes");
}
