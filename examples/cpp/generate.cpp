// Generates greedily with an exported engine; Python is not needed.
//
//   generate DIR/aoti --max-new-tokens 32 --threads 2 --prompt "105 109 112" --prompt "100 101"
//
// A prompt is a row of token ids; without --prompt, each line of standard input is one. Prints each
// row's new tokens in a line, and the speed to standard error.
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>

#include "engine.h"

namespace {

struct Options {
  std::string folder;
  int64_t new_tokens = 32;
  int threads = 0;
  std::vector<std::string> prompts;
};

int64_t positive(const std::string& name, const std::string& text) {
  size_t read = 0;
  long long value = 0;
  try {
    value = std::stoll(text, &read);
  } catch (const std::exception&) {
  }
  if (value < 1 || read != text.size()) {
    throw std::invalid_argument(name + " is \"" + text + "\"; give a positive number");
  }
  return value;
}

Options parse(int count, char** given) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = given[i];
    if (name.rfind("--", 0) != 0) {
      options.folder = name;
      continue;
    }
    if (i + 1 == count) throw std::invalid_argument(name + " needs a value");
    const std::string value = given[++i];
    if (name == "--max-new-tokens") {
      options.new_tokens = positive(name, value);
    } else if (name == "--threads") {
      options.threads = static_cast<int>(positive(name, value));
    } else if (name == "--prompt") {
      options.prompts.push_back(value);
    } else {
      throw std::invalid_argument("unknown option " + name +
                                  "; known: --max-new-tokens, --threads, --prompt");
    }
  }
  if (options.folder.empty()) {
    throw std::invalid_argument("give the folder of an engine, as in: generate DIR/aoti");
  }
  const bool given_none = options.prompts.empty();
  for (std::string line; given_none && std::getline(std::cin, line);) {
    if (!line.empty()) options.prompts.push_back(line);
  }
  if (options.prompts.empty()) throw std::invalid_argument("no prompt: give token ids");
  return options;
}

std::vector<int64_t> ids(const std::string& prompt, int64_t vocabulary) {
  std::vector<int64_t> made;
  std::istringstream words(prompt);
  for (int64_t id; words >> id;) {
    if (id < 0 || id >= vocabulary) {
      throw std::invalid_argument("token " + std::to_string(id) + " is none of the vocabulary's " +
                                  std::to_string(vocabulary));
    }
    made.push_back(id);
  }
  if (!words.eof() || made.empty()) {
    throw std::invalid_argument("prompt \"" + prompt + "\": expected token ids, as in \"105 109\"");
  }
  return made;
}

double seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

void run(const Options& options) {
  const c10::InferenceMode guard;
  if (options.threads) at::set_num_threads(options.threads);
  Engine engine(options.folder);
  std::vector<std::vector<int64_t>> prompts;
  for (const std::string& prompt : options.prompts) {
    prompts.push_back(ids(prompt, engine.vocabulary()));
  }
  const int64_t batch = static_cast<int64_t>(prompts.size());
  std::vector<int64_t> lengths;
  for (const auto& prompt : prompts) lengths.push_back(static_cast<int64_t>(prompt.size()));
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  if (!engine.ragged() && *std::min_element(lengths.begin(), lengths.end()) != longest) {
    throw std::invalid_argument("this model's sequences share a position: give prompts of one length");
  }
  const int64_t total = longest + options.new_tokens;
  if (engine.context() && total > engine.context()) {
    throw std::invalid_argument(std::to_string(total) + " tokens exceed the context of " +
                                std::to_string(engine.context()));
  }
  at::Tensor tokens = at::zeros({batch, longest}, at::kLong);
  for (int64_t b = 0; b < batch; ++b) {
    tokens[b].narrow(0, 0, lengths[b]).copy_(at::tensor(prompts[b], at::kLong));
  }
  engine.start(batch, total);
  const double begun = seconds();
  at::Tensor next = engine.feed(tokens, lengths, /*prompt=*/true).argmax(-1, /*keepdim=*/true);
  const double read = seconds();
  std::vector<at::Tensor> made = {next};
  const std::vector<int64_t> one(batch, 1);
  while (static_cast<int64_t>(made.size()) < options.new_tokens) {
    next = engine.feed(next, one, /*prompt=*/false).argmax(-1, /*keepdim=*/true);
    made.push_back(next);
  }
  const double done = seconds();
  const at::Tensor all = at::cat(made, 1);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < all.size(1); ++i) {
      std::cout << (i ? " " : "") << all[b][i].item<int64_t>();
    }
    std::cout << "\n";
  }
  const double steps = static_cast<double>(made.size() - 1) * static_cast<double>(batch);
  std::fprintf(stderr, "prompt: %lld tokens in %.3f s; then %.1f tokens/s\n",
               static_cast<long long>(longest * batch), read - begun,
               steps / std::max(done - read, 1e-9));
}

}  // namespace

int main(int count, char** given) {
  try {
    run(parse(count, given));
  } catch (const std::invalid_argument& mistake) {
    std::fprintf(stderr, "generate: %s\n", mistake.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "generate: %s\n", error.what());
    return 1;
  }
  return 0;
}
