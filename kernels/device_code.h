// Which of a build's code a card runs, as the CUDA driver chooses it, and what to say where there is none. Plain C++.
#pragma once

#include <string>
#include <string_view>

namespace spot::kernels {

constexpr int kOldestArchitecture = 80;

struct DeviceCode {
  int architecture = 0;  // what it was compiled for: 80, 90, ...; 0: this build has none for the card
  bool specific =
      false;  // with the instructions of just that architecture (the a of 90a: warpgroup products)
};

// `built` is SPOT_CUDA_ARCHITECTURES as CMake writes it, separated by anything else than its words: "80 90a-real". A
// number alone stands for machine code and PTX. Machine code runs on its own generation from its own number on; PTX on
// everything from its number on; both only on the very card where an `a` follows the number.
inline DeviceCode device_code(std::string_view built, int capability) {
  DeviceCode machine, ptx;
  const auto better = [](const DeviceCode& now, int number, bool specific) {
    return number > now.architecture || (number == now.architecture && specific);
  };
  const auto is_word = [](char c) { return c == '-' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z'); };
  for (size_t at = 0; at < built.size();) {
    size_t end = at;
    while (end < built.size() && is_word(built[end])) ++end;
    const std::string_view word = built.substr(at, end - at);
    at = end + 1;
    int number = 0;
    size_t i = 0;
    for (; i < word.size() && word[i] >= '0' && word[i] <= '9'; ++i) number = 10 * number + (word[i] - '0');
    if (number == 0) continue;
    const bool exact = i < word.size() && word[i] == 'a';
    const bool family = i < word.size() && word[i] == 'f';
    if (exact ? capability != number : capability < number) continue;
    const bool same_generation = capability / 10 == number / 10;
    if (word.find("-virtual") == std::string_view::npos && same_generation && better(machine, number, exact))
      machine = {number, exact};
    if (word.find("-real") == std::string_view::npos && (!family || same_generation) &&
        better(ptx, number, exact))
      ptx = {number, exact};
  }
  return machine.architecture != 0 ? machine : ptx;
}

// One sentence where the card cannot run this build, else nothing.
inline std::string device_refusal(std::string_view built, std::string_view name, int capability) {
  if (capability >= kOldestArchitecture && device_code(built, capability).architecture != 0) return "";
  const auto dotted = [](int number) {
    return std::to_string(number / 10) + "." + std::to_string(number % 10);
  };
  std::string list;
  for (const char c : built) list += c == ' ' ? ';' : c;
  std::string sentence(name);
  sentence +=
      " (compute capability " + dotted(capability) + ") cannot run this build's CUDA code, which was built ";
  sentence += "with SPOT_CUDA_ARCHITECTURES=\"" + list + "\"; ";
  if (capability < kOldestArchitecture)
    sentence +=
        "cards from compute capability " + dotted(kOldestArchitecture) + " on can: use one, or the CPU";
  else
    sentence +=
        "build with -DSPOT_CUDA_ARCHITECTURES=\"80;90a\", which runs on every card from 8.0 on, or use the CPU";
  return sentence;
}

}  // namespace spot::kernels
