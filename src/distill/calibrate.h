// Temperatures that make p mean what it says, the residual mass that makes a threshold one on all attention, and which
// threshold captures which mass.
//
// Dual top-p takes blocks until a softmax of the selector's block-max scores reaches p. That softmax is no
// attention mass, so the mass really captured differs from p, and by layer. Here a temperature is fitted for
// each layer such that on held-out text, over p in 0.5 .. 0.95,
//   captured(p) = share of the residual attention mass (that outside the reserved sink and recency blocks)
//   that lies on
//                 the nucleus, head-averaged, mean over queries and groups
// is as close to p as one number allows: the mean of |captured(p) - p| is least. The floor on selected tokens
// is left out of the fit (it only adds blocks).
// residual_mass, of each layer and set, is the mean of that residual attention mass, which the selector does not
// estimate: a block of share s of the residual has about s * residual_mass of all attention.
// mass_table is what thresholds on all attention then capture and read, reserved blocks and floor included. Both are
// means over the queries of the last quarter of the longest contexts, where decode stands.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

#include "distill/data.h"
#include "model/backbone.h"
#include "selector/selector.h"

namespace spot {

// 2^-first, 2^-(first + 0.5), ..., 2^-last.
std::vector<double> half_octaves(int first, int last);

struct CalibrationOptions {
  std::vector<double> p = {0.5, 0.6, 0.7, 0.8, 0.9, 0.95};
  std::vector<double> threshold = half_octaves(6, 16);  // of the mass table, falling
  bool fit_temperature = true;         // false: those of the selector, to which the rest is fitted
  int64_t queries_per_sequence = 256;  // spread evenly where at least 16 residual blocks exist, in runs of 16
};

struct Calibration {
  std::vector<int64_t> layers;        // model layers with a selector
  std::vector<double> temperature;    // by layer; where nothing could be measured, 1 or the selector's own
  std::vector<double> residual_mass;  // [layers * groups]; empty where nothing could be measured
  std::vector<MassRow> mass_table;    // likewise; masses and shares of the tokens are running maxima
  int64_t queries = 0;                // measured in each layer
  int64_t late_queries = 0;           // of them in the last quarter of the longest context
  int64_t contexts = 0, length = 0;   // contexts that were long enough, and the tokens of the longest
  std::vector<double> p;
  // [layers][p], means over queries: the nucleus' share of the residual mass at temperature 1 and at the
  // fitted one...
  std::vector<std::vector<double>> captured_before, captured_after;
  // ... and, at the fitted one, for the whole selection (reserved blocks and floor included): its share of
  // the residual mass, of all mass, and of the visible tokens.
  std::vector<std::vector<double>> selected_residual, selected_total, selected_tokens;

  // Mean over p of |captured - p|, by layer.
  std::vector<double> error_before() const, error_after() const;
  nlohmann::json to_json() const;
  // What a selector's notes say of its mass table: {"contexts", "length", "queries", "data_paths"}.
  nlohmann::json mass_notes(const std::vector<std::filesystem::path>& data_paths) const;
};

// Runs the backbone densely over the sequences (each as one whole context, which should be as long as the
// contexts that matter and longer than sinks + recency + 16 blocks; shorter ones are left out). The selector
// is not changed: assign `temperature`, `residual_mass` and `mass_table` to those of Selector::selection().
Calibration calibrate(const Backbone& backbone, const Selector& selector,
                      const std::vector<TokenSequence>& sequences, const CalibrationOptions& options = {},
                      bool show_progress = true);

// What calibrate() finds before it fits anything, in a form that adds up over parts of a text: [layers, p +
// 1] float64 on the
// CPU; for each p the nucleus' share of the residual mass at temperature 1, summed over the measured queries,
// and in the last column their number.
at::Tensor captured_sums(const Backbone& backbone, const Selector& selector,
                         const std::vector<TokenSequence>& sequences, const CalibrationOptions& options = {});

}  // namespace spot
