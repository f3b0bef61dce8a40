// Reads JSON: enough for state.json, in a file of its own. A runtime has a library for this.
#pragma once

#include <cctype>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace json {

struct Value {
  enum Kind { null, boolean, number, text, list, object } kind = null;
  double real = 0;  // of a number; 0 or 1 of a boolean
  std::string string;
  std::vector<Value> items;
  std::map<std::string, Value> members;

  explicit operator bool() const { return kind != null; }

  const Value& operator[](const std::string& name) const {
    const auto found = members.find(name);
    if (found == members.end()) throw std::runtime_error("state.json has no \"" + name + "\"");
    return found->second;
  }
  long long whole() const { return static_cast<long long>(real); }
};

class Reader {
 public:
  explicit Reader(const std::string& text) : at_(text.data()), end_(text.data() + text.size()) {}

  Value whole() {
    Value value = read();
    if (next()) fail("the end");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& wanted) const {
    throw std::runtime_error("damaged JSON: expected " + wanted);
  }
  char next() {
    while (at_ < end_ && std::isspace(static_cast<unsigned char>(*at_))) ++at_;
    return at_ < end_ ? *at_ : '\0';
  }
  bool take(char wanted) { return next() == wanted && ++at_; }
  void need(char wanted) {
    if (!take(wanted)) fail(std::string(1, wanted));
  }
  bool word(const char* wanted) {
    const std::string_view given(wanted);
    if (std::string_view(at_, end_ - at_).substr(0, given.size()) != given) return false;
    at_ += given.size();
    return true;
  }

  Value read() {
    Value value;
    const char first = next();
    if (take('{')) {
      value.kind = Value::object;
      while (!take('}')) {
        if (!value.members.empty()) need(',');
        if (next() != '"') fail("a name");
        const std::string name = string();
        need(':');
        value.members[name] = read();
      }
    } else if (take('[')) {
      value.kind = Value::list;
      while (!take(']')) {
        if (!value.items.empty()) need(',');
        value.items.push_back(read());
      }
    } else if (first == '"') {
      value.kind = Value::text;
      value.string = string();
    } else if (word("null")) {
    } else if (word("true") || word("false")) {
      value.kind = Value::boolean;
      value.real = first == 't';
    } else {
      value.kind = Value::number;
      char* stop = nullptr;
      value.real = std::strtod(at_, &stop);
      if (stop == at_) fail("a value");
      at_ = stop;
    }
    return value;
  }

  std::string string() {
    std::string made;
    need('"');
    while (at_ < end_ && *at_ != '"') {
      if (*at_ == '\\' && (++at_ == end_ || (*at_ != '"' && *at_ != '\\' && *at_ != '/'))) {
        fail("a name without escapes");
      }
      made += *at_++;
    }
    need('"');
    return made;
  }

  const char* at_;
  const char* end_;
};

inline Value read(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return Reader(text).whole();
}

}  // namespace json
