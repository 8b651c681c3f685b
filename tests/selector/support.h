// What the tests of selector, selection and attention share: fresh seeds and small model shapes.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <string>

#include "checkpoint/config.h"
#include "core/error.h"
#include "core/files.h"

namespace spot::test {

// A new seed each run (or SPOT_TEST_SEED), printed so that a failure can be repeated; seeds torch too.
inline uint64_t fresh_seed() {
  const char* fixed = std::getenv("SPOT_TEST_SEED");
  const uint64_t seed = fixed ? std::strtoull(fixed, nullptr, 10) : std::random_device{}();
  std::printf("SPOT_TEST_SEED=%llu\n", static_cast<unsigned long long>(seed));
  at::manual_seed(seed);
  return seed;
}

inline int64_t random_int(int64_t low, int64_t high) {
  return at::randint(low, high + 1, {1}).item<int64_t>();
}

// A dense model's shape without weights; every layer has full attention.
inline ModelConfig small_model(int64_t hidden, int64_t layers, int64_t heads, int64_t kv_heads,
                               int64_t head_dim) {
  ModelConfig config;
  config.architecture = "Qwen3ForCausalLM";
  config.model_type = "qwen3";
  config.hidden_size = hidden;
  config.num_layers = layers;
  config.num_heads = heads;
  config.num_kv_heads = kv_heads;
  config.head_dim = head_dim;
  config.intermediate_size = 2 * hidden;
  config.vocab_size = 97;
  config.max_position_embeddings = 8192;
  config.qk_norm = true;
  config.rope.theta = 1e6;
  config.rope.rotary_dim = head_dim;
  config.layer_kinds.assign(layers, LayerKind::full_attention);
  return config;
}

// A folder that disappears with the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "spot-XXXXXX").string();
    if (!mkdtemp(pattern.data())) throw std::runtime_error("cannot make a temporary folder");
    path_ = pattern;
  }
  ~TemporaryFolder() { remove_folder(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// The message of the Error that f throws; fails the test when it throws none.
template <typename F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  ADD_FAILURE() << "no spot::Error was thrown";
  return "";
}

inline double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 && b.numel() == 0) return 0;
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace spot::test
