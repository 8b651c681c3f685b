#include "eval/ruler_score.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/error.h"
#include "eval/ruler_random.h"

namespace spot {
namespace {

std::string lower(std::string text) {
  for (char& c : text)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return text;
}

int64_t count_found(const std::string& output, const std::vector<std::string>& references) {
  if (references.empty())
    fail("RULER score: a prompt has no reference answer; there is nothing to compare with");
  const std::string text = lower(output);
  return std::count_if(references.begin(), references.end(),
                       [&](const std::string& r) { return text.find(lower(r)) != std::string::npos; });
}

}  // namespace

std::string clean_output(const std::string& output) {
  std::string text = output;
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20) c = '\n';
  const size_t first = text.find_first_not_of(" \n");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \n") - first + 1);
}

double string_match_all(const std::string& output, const std::vector<std::string>& references) {
  return static_cast<double>(count_found(output, references)) / static_cast<double>(references.size());
}

double string_match_part(const std::string& output, const std::vector<std::string>& references) {
  return count_found(output, references) > 0 ? 1 : 0;
}

double ruler_score(RulerTask task, const std::string& output, const std::vector<std::string>& references) {
  const bool any = task == RulerTask::qa_1 || task == RulerTask::qa_2;
  return any ? string_match_part(clean_output(output), references)
             : string_match_all(clean_output(output), references);
}

Interval bootstrap_mean(const std::vector<std::vector<double>>& strata, uint64_t seed, int64_t resamples) {
  std::vector<std::vector<double>> filled;
  for (const auto& values : strata)
    if (!values.empty()) filled.push_back(values);
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  if (filled.empty() || resamples < 1) return {nan, nan, nan};

  // The mean over strata of what `value` gives for each index of a stratum.
  auto mean = [&](auto&& value) {
    double sum = 0;
    for (const auto& values : filled) {
      double part = 0;
      for (size_t i = 0; i < values.size(); ++i) part += value(values, i);
      sum += part / static_cast<double>(values.size());
    }
    return sum / static_cast<double>(filled.size());
  };
  RulerRandom random(fmt::format("bootstrap/{}", seed));
  std::vector<double> means;
  for (int64_t r = 0; r < resamples; ++r)
    means.push_back(mean([&](const std::vector<double>& values, size_t) { return random.pick(values); }));
  std::sort(means.begin(), means.end());
  auto percentile = [&](double share) {  // linear between the nearest ranks
    const double at = share * static_cast<double>(means.size() - 1);
    const auto below = static_cast<size_t>(at);
    const double above = below + 1 < means.size() ? means[below + 1] : means[below];
    return means[below] + (at - static_cast<double>(below)) * (above - means[below]);
  };
  return {mean([](const std::vector<double>& values, size_t i) { return values[i]; }), percentile(0.025),
          percentile(0.975)};
}

Interval wilson_interval(int64_t successes, int64_t trials) {
  constexpr double z = 1.959963984540054;  // of the two-sided 95%
  const auto n = static_cast<double>(trials);
  const double share = static_cast<double>(successes) / n, centre = share + z * z / (2 * n);
  const double half = z * std::sqrt(share * (1 - share) / n + z * z / (4 * n * n)), divisor = 1 + z * z / n;
  return {share, std::max(0.0, (centre - half) / divisor), std::min(1.0, (centre + half) / divisor)};
}

}  // namespace spot
