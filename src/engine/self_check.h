// Whether a selector serves the weights that it runs on: the captured mass of sampled decode steps.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "attention/sparse.h"
#include "model/backbone.h"
#include "selector/selector.h"

namespace spot {

// A decode step of an answer is checked every so many tokens where the selector is of other weights.
inline constexpr int64_t kForeignCheckEvery = 16;
// A selector that holds less than this of the exact attention is of no use, whatever the budget (as in Python).
inline constexpr double kLeastCaptured = 0.5;

// One sentence when the selector was distilled on other weights of the backbone's architecture; else empty.
std::string foreign_weights(const Selector& selector, const Backbone& backbone);
// One sentence when a method captured less than kLeastCaptured; else empty. Not a number: nothing was measured.
std::string low_mass(const std::string& method, double captured);

// What the rows that it was shown captured, by layer.
class SelfCheck {
 public:
  struct Layer {
    int64_t samples = 0;
    double mass = 0;  // summed over samples
    double mean() const { return mass / static_cast<double>(samples); }
  };
  // The captured mass of a row of an event of decode rows; it counts unless the row read everything, by the rule's floor.
  double add(const SelectionEvent& event, int64_t row);
  const std::map<int64_t, Layer>& layers() const { return layers_; }
  // Over layers; not a number before the first sample.
  double mean() const;
  // "captured mass 0.943 (least 0.901, layer 3) in 40 samples"
  std::string describe() const;
  // low_mass, once there are 8 samples of each layer, and once only.
  std::string warning(const std::string& method);

 private:
  std::map<int64_t, Layer> layers_;
  bool warned_ = false;
};

}  // namespace spot
