#include "engine/self_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "attention/decode_mass.h"

namespace spot {
namespace {

constexpr int64_t kJudged = 8;  // of a layer, before the mean is judged: a single step may look anywhere

}  // namespace

std::string foreign_weights(const Selector& selector, const Backbone& backbone) {
  if (selector.made_for(backbone.fingerprint())) return "";
  return fmt::format(
      "the selector was distilled on other weights of this architecture (fingerprint {}, this model's is {}); it can serve "
      "close ones, such as a quantised copy, so its captured mass is measured on sampled steps",
      selector.fingerprint(), backbone.fingerprint());
}

std::string low_mass(const std::string& method, double captured) {
  if (!(captured < kLeastCaptured)) return "";
  return fmt::format(
      "attention '{}' captured {:.3f} of the exact attention in sampled steps, less than {:g}; raise the budget or p, or "
      "distil a selector for these weights",
      method, captured, kLeastCaptured);
}

double SelfCheck::add(const SelectionEvent& event, int64_t row) {
  const double mass = captured_by_row(event, row);
  const int64_t length = event.inputs.batch.starts[static_cast<size_t>(row)] + 1;
  if (length <= event.rule.floor) return mass;
  Layer& layer = layers_[event.layer];
  layer.samples += 1;
  layer.mass += mass;
  return mass;
}

double SelfCheck::mean() const {
  double sum = 0;
  for (const auto& [_, layer] : layers_) sum += layer.mean();
  return layers_.empty() ? std::numeric_limits<double>::quiet_NaN()
                         : sum / static_cast<double>(layers_.size());
}

std::string SelfCheck::describe() const {
  if (layers_.empty()) return "captured mass not measured: every sampled step read all of its tokens";
  int64_t samples = 0;
  const auto least = std::min_element(layers_.begin(), layers_.end(), [](const auto& a, const auto& b) {
    return a.second.mean() < b.second.mean();
  });
  for (const auto& [_, layer] : layers_) samples += layer.samples;
  return fmt::format("captured mass {:.3f} (least {:.3f}, layer {}) in {} samples", mean(),
                     least->second.mean(), least->first, samples);
}

std::string SelfCheck::warning(const std::string& method) {
  if (warned_ || layers_.empty()) return "";
  for (const auto& [_, layer] : layers_)
    if (layer.samples < kJudged) return "";
  const std::string text = low_mass(method, mean());
  warned_ = !text.empty();
  return text;
}

}  // namespace spot
