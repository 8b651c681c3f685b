// RULER's scores, and how sure a mean of them is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "eval/ruler_tasks.h"

namespace spot {

// What RULER scores of a model's output: control characters become line breaks, and white space at both ends
// goes.
std::string clean_output(const std::string& output);

// Share of the references that occur in the output, letters of either case alike (ASCII). Throws Error
// without any reference.
double string_match_all(const std::string& output, const std::vector<std::string>& references);
// 1 if any of them occurs, else 0.
double string_match_part(const std::string& output, const std::vector<std::string>& references);
// string_match_part of the cleaned output for qa_1 and qa_2, string_match_all of it for the others; in [0,
// 1].
double ruler_score(RulerTask task, const std::string& output, const std::vector<std::string>& references);

// A mean and its 95% confidence interval.
struct Interval {
  double mean = 0, low = 0, high = 0;
};

// Percentile bootstrap of the mean over strata of the strata's means: each resample draws as many values as
// there are from each stratum by itself (a stratum is a task; with one stratum this is the plain bootstrap).
// Empty strata are left out; NaN when nothing is left. The same values and seed give the same interval on
// every platform.
Interval bootstrap_mean(const std::vector<std::vector<double>>& strata, uint64_t seed = 42,
                        int64_t resamples = 1000);

// Wilson's interval of a share: `successes` of `trials` > 0.
Interval wilson_interval(int64_t successes, int64_t trials);

}  // namespace spot
