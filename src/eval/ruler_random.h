// Random numbers that are the same on every platform: the standard fixes the engine, and the draws are ours.
#pragma once

#include <cstdint>
#include <random>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

namespace spot {

// 64-bit FNV-1a of some bytes.
inline uint64_t stable_hash(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (char c : bytes) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3ull;
  return hash;
}

// A stream of random numbers, named by a text such as "7/niah_single_1/4096/0".
class RulerRandom {
 public:
  explicit RulerRandom(std::string_view stream) : engine_(stable_hash(stream)) {}

  // Uniform in 0 .. n - 1; n > 0.
  int64_t below(int64_t n) {
    const auto range = static_cast<uint64_t>(n);
    const uint64_t reject = (0 - range) % range;  // 2^64 mod n: the draws that would favour the small numbers
    uint64_t draw = engine_();
    while (draw < reject) draw = engine_();
    return static_cast<int64_t>(draw % range);
  }
  uint64_t bits() { return engine_(); }

  template <typename Container>
  const auto& pick(const Container& items) {
    return items[static_cast<size_t>(below(static_cast<int64_t>(items.size())))];
  }
  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i)
      std::swap(items[i - 1], items[static_cast<size_t>(below(static_cast<int64_t>(i)))]);
  }
  // `count` distinct numbers of 0 .. n - 1, ascending; count <= n.
  std::vector<int64_t> sample(int64_t n, int64_t count) {
    std::set<int64_t> chosen;  // Floyd's method: as many draws as numbers
    for (int64_t i = n - count; i < n; ++i) {
      const int64_t draw = below(i + 1);
      chosen.insert(chosen.count(draw) ? i : draw);
    }
    return {chosen.begin(), chosen.end()};
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace spot
