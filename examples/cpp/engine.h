// An engine that memcompile exported as AOTInductor package, driven by its state.json.
#pragma once

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "json.h"

using Loader = torch::inductor::AOTIModelPackageLoader;

class Engine {
 public:
  // folder: DIR/aoti or DIR/aoti-portable.
  explicit Engine(const std::string& folder) : contract_(json::read(folder + "/state.json")) {
    const std::string kernels = folder + "/libmemcompile_engine.so";
    if (std::filesystem::exists(kernels) && !dlopen(kernels.c_str(), RTLD_NOW)) {
      throw std::runtime_error(dlerror());
    }
    step_ = std::make_unique<Loader>(folder + "/engine.pt2");
    const std::string prompt = folder + "/prefill.pt2";
    if (!std::filesystem::exists(prompt)) return;
    // A prompt is read by a graph of its own, with the weights that lie in memory already.
    prefill_ = std::make_unique<Loader>(prompt);
    const auto held = step_->get_runner()->extract_constants_map(/*use_inactive=*/false);
    std::unordered_map<std::string, at::Tensor> shared;
    for (const std::string& name : prefill_->get_constant_fqns()) shared[name] = held.at(name);
    prefill_->load_constants(shared, /*use_inactive=*/false, /*check_full_update=*/true,
                             /*user_managed=*/true);
  }

  // Begins `batch` sequences with room for `tokens` tokens each.
  void start(int64_t batch, int64_t tokens) {
    position_.assign(batch, 0);
    int64_t capacity = 0;
    if (const json::Value& room = contract_["capacity"]) {
      const int64_t multiple = room["multiple"].whole();
      capacity = (tokens + multiple - 1) / multiple * multiple;
    }
    state_.clear();
    for (const json::Value& tensor : contract_["state"].items) {
      std::vector<int64_t> shape;
      for (const json::Value& size : tensor["shape"].items) shape.push_back(size.whole());
      shape.at(tensor["batch_axis"].whole()) = batch;
      if (const json::Value& grows = tensor["grows"]) {
        shape.at(grows["axis"].whole()) = capacity / grows["tokens"].whole();
      }
      state_.push_back(at::full(shape, tensor["init"].real, dtype(tensor["dtype"].string)));
    }
  }

  // Feeds tokens [batch, n]; row i has lengths[i] of them, the rest is padding. Returns the logits
  // [batch, vocabulary] of each row's last token.
  at::Tensor feed(const at::Tensor& tokens, const std::vector<int64_t>& lengths, bool prompt) {
    const int64_t batch = tokens.size(0), n = tokens.size(1);
    at::Tensor last;
    for (int64_t begin = 0; begin < n;) {
      std::vector<int64_t> left(batch);
      for (int64_t b = 0; b < batch; ++b) left[b] = std::max<int64_t>(lengths[b] - begin, 0);
      const int64_t count = room(n - begin, left);
      for (int64_t& valid : left) valid = std::min(valid, count);
      const at::Tensor logits = call(tokens.narrow(1, begin, count), left, prompt);
      if (!last.defined()) last = at::zeros({batch, logits.size(2)}, logits.options());
      for (int64_t b = 0; b < batch; ++b) {
        if (left[b]) last[b] = logits[b][left[b] - 1];
        position_[b] += left[b];
      }
      begin += count;
    }
    return last;
  }

  bool ragged() const { return static_cast<bool>(contract_["lengths"]); }
  int64_t vocabulary() const { return contract_["vocabulary"].whole(); }
  // Most tokens of a sequence; 0: any number.
  int64_t context() const { return contract_["context"] ? contract_["context"].whole() : 0; }

 private:
  static at::ScalarType dtype(const std::string& name) {
    static const std::unordered_map<std::string, at::ScalarType> known = {
        {"float16", at::kHalf},   {"bfloat16", at::kBFloat16}, {"float32", at::kFloat},
        {"float64", at::kDouble}, {"int32", at::kInt},         {"int64", at::kLong}};
    return known.at(name);
  }

  // Of n tokens, those that one call may take.
  int64_t room(int64_t n, const std::vector<int64_t>& left) const {
    if (const json::Value& longest = contract_["longest_call"]) n = std::min<int64_t>(n, longest.whole());
    if (const json::Value& splits = contract_["splits_at"]) {
      for (size_t b = 0; b < left.size(); ++b) {
        if (left[b]) n = std::min<int64_t>(n, splits.whole() - position_[b] % splits.whole());
      }
    }
    return n;
  }

  at::Tensor call(const at::Tensor& tokens, const std::vector<int64_t>& lengths, bool prompt) {
    // Inputs are contiguous: a package does not look at strides.
    std::vector<at::Tensor> inputs = {tokens.contiguous(), at::tensor(position_, at::kInt)};
    if (ragged()) inputs.push_back(at::tensor(lengths, at::kInt));
    inputs.insert(inputs.end(), state_.begin(), state_.end());
    const std::vector<at::Tensor> made = (prompt && prefill_ ? prefill_ : step_)->run(inputs);
    const auto& told = contract_["state"].items;
    for (size_t i = 0, next = 1; i < told.size(); ++i) {
      // State whose output has the name of its input was updated in place.
      if (told[i]["output"].string != told[i]["input"].string) state_[i] = made.at(next++);
    }
    return made.at(0);
  }

  json::Value contract_;
  std::unique_ptr<Loader> step_, prefill_;
  std::vector<at::Tensor> state_;
  std::vector<int64_t> position_;
};
