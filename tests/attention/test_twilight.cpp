#include <gtest/gtest.h>

#include "attention/mass.h"
#include "attention/policies/quest.h"
#include "attention/policies/twilight.h"
#include "attention/sparse.h"
#include "tests/attention/support.h"

using namespace spot;
using namespace spot::test;

namespace {

SelectionRule quest_rule() {
  SelectionRule rule;
  rule.mode = SelectionMode::top_k;
  rule.budget = 160;
  rule.sinks = 16;
  rule.recency = 32;
  rule.floor = 64;
  return rule;
}

// A key as Twilight's copy gives it back, number by number: codes against the rounded scale and minimum.
std::vector<double> through_four_bits(const at::Tensor& key) {
  const at::Tensor values = key.to(at::kFloat).contiguous();
  const float* x = values.const_data_ptr<float>();
  const auto [low, high] = std::minmax_element(x, x + values.numel());
  const auto scale = static_cast<float>(c10::Half((*high - *low) / 15)),
             minimum = static_cast<float>(c10::Half(*low));
  std::vector<double> back;
  for (int64_t i = 0; i < values.numel(); ++i) {
    const float code = scale > 0 ? std::clamp(std::nearbyint((x[i] - minimum) / scale), 0.0f, 15.0f) : 0;
    back.push_back(static_cast<double>(code) * scale + minimum);
  }
  return back;
}

// What one query head must and may keep of `tokens`: those before which less (more) than p of the estimated
// weight lies, in descending order. Between the two only rounding decides.
struct Kept {
  std::set<int64_t> surely, perhaps;
};
Kept keep_top_p(const at::Tensor& query, const at::Tensor& keys, const std::vector<int64_t>& tokens,
                double scale, double p) {
  std::vector<std::pair<double, int64_t>> weights;
  double sum = 0;
  for (int64_t token : tokens) {
    const std::vector<double> key = through_four_bits(keys[token]);
    double score = 0;
    for (size_t i = 0; i < key.size(); ++i) score += query[i].item<double>() * key[i] * scale;
    weights.emplace_back(std::exp(score), token);
    sum += weights.back().first;
  }
  std::sort(weights.rbegin(), weights.rend());
  Kept kept;
  double before = 0;
  for (const auto& [weight, token] : weights) {
    if (before / sum < p - 1e-5) kept.surely.insert(token);
    if (before / sum < p + 1e-5) kept.perhaps.insert(token);
    before += weight;
  }
  return kept;
}

std::set<int64_t> attended(const Selection& selection, int64_t row, int64_t group, int64_t length) {
  const at::Tensor mask = token_mask(selection.row(row), length)[0][group];
  std::set<int64_t> tokens;
  for (int64_t t = 0; t < length; ++t)
    if (mask[t].item<bool>()) tokens.insert(t);
  return tokens;
}

bool holds(const std::set<int64_t>& outer, const std::set<int64_t>& inner) {
  return std::includes(outer.begin(), outer.end(), inner.begin(), inner.end());
}

}  // namespace

// The definition in double precision: Quest's blocks, then for each query head the fewest tokens whose
// weights, estimated with four-bit keys, reach p; a KV head attends to the union over its query heads.
TEST(Twilight, EachHeadPrunesQuestsBlocksAndTheUnionIsAttended) {
  fresh_seed();
  const ModelConfig model = small_model(24, 1, 6, 2, 32);
  for (double p : {0.5, 0.9}) {
    LayerHistory history(model, 80, at::kFloat, 3);
    TwilightPolicy policy(model, history.pools(), quest_rule(), p);
    QuestPolicy quest(model, history.pools(), quest_rule());
    SparseOptions options;
    options.prefill = PrefillMode::sparse;
    SparseAttention attention(history.cache(), policy, options);
    for (const auto& counts :
         {std::vector<int64_t>{random_int(300, 500), random_int(20, 60), random_int(70, 100)},
          {random_int(2, 30), random_int(2, 5), 2},
          {1, 1, 1}}) {
      const Pass pass = history.next(counts);
      const AttentionInputs inputs = pass.inputs(0, history.scale());
      size_t kept_tokens = 0, proposed_tokens = 0;
      int64_t rows = 0;
      attention.set_observer([&](const SelectionEvent& event) {
        for (int64_t r = 0; r < event.selection.rows(); ++r) {
          const bool decode = event.chunk.sequence < 0;
          const int64_t sequence = decode ? r : event.chunk.sequence,
                        row = decode ? r : event.chunk.first + r;
          const int64_t position = pass.batch.positions[row].item<int64_t>(), length = position + 1;
          if (!decode && r % 37 != 0) continue;  // the reference is slow
          rows += 1;
          const QueryChunk one{sequence, row, 1, position};
          const Selection base = quest.select_chunk(inputs, one);
          for (int64_t g = 0; g < 2; ++g) {
            const std::set<int64_t> got = attended(event.selection, r, g, length);
            const std::vector<int64_t> proposed =
                tokens_of_blocks(base.indices[0][g], base.counts[0][g].item<int32_t>(), length);
            if (length <= quest_rule().floor) {
              EXPECT_EQ(static_cast<int64_t>(got.size()), length);
              continue;
            }
            std::set<int64_t> surely, perhaps;
            for (int64_t h = 3 * g; h < 3 * g + 3; ++h) {
              const Kept kept = keep_top_p(pass.query[row][h], history.keys(sequence).select(1, g), proposed,
                                           history.scale(), p);
              surely.insert(kept.surely.begin(), kept.surely.end());
              perhaps.insert(kept.perhaps.begin(), kept.perhaps.end());
            }
            EXPECT_TRUE(holds(got, surely)) << "a token is missing at position " << position;
            EXPECT_TRUE(holds(perhaps, got)) << "a token is too much at position " << position;
            kept_tokens += got.size(), proposed_tokens += proposed.size();
          }
        }
      });
      write_tokens(history.pools().get("keys", 0), pass.batch.slots, inputs.key);
      quest.append(inputs);
      attention.forward(inputs);
      EXPECT_GE(rows, 2);
      EXPECT_LT(kept_tokens, proposed_tokens) << "nothing was pruned";
    }
  }
}

TEST(Twilight, AttendsToTheSurvivorsAndNothingElse) {
  fresh_seed();
  for (at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const ModelConfig model = small_model(24, 1, 6, 2, 32);
    LayerHistory history(model, 60, dtype, 2);
    TwilightPolicy policy(model, history.pools(), quest_rule(), 0.7);
    SparseOptions options;
    options.prefill = PrefillMode::sparse;
    SparseAttention attention(history.cache(), policy, options);
    for (const auto& counts : {std::vector<int64_t>{random_int(300, 400), random_int(1, 20)},
                               {random_int(2, 20), random_int(2, 20)},
                               {1, 1}}) {
      const Pass pass = history.next(counts);
      std::map<int64_t, std::vector<std::vector<int64_t>>> seen;
      double kept = 0;
      attention.reset_counters();
      attention.set_observer([&](const SelectionEvent& event) {
        for (int64_t r = 0; r < event.selection.rows(); ++r) {
          const int64_t row = event.chunk.sequence < 0 ? r : event.chunk.first + r;
          const int64_t length = pass.batch.positions[row].item<int64_t>() + 1;
          for (int64_t g = 0; g < 2; ++g) {
            const auto tokens = attended(event.selection, r, g, length);
            seen[row].emplace_back(tokens.begin(), tokens.end());
            kept += static_cast<double>(tokens.size()) / 2;
          }
        }
      });
      const at::Tensor got = attention.forward(pass.inputs(0, history.scale()));
      EXPECT_NEAR(attention.counters().empty() ? 0 : attention.counters().at(0).tokens_attended, kept, 1e-6);
      int64_t row = 0;
      for (size_t i = 0; i < counts.size(); ++i)
        for (int64_t t = 0; t < counts[i]; ++t, ++row) {
          if (!pass.batch.is_decode() && t % 23 != 0) continue;  // the plain oracle is slow
          const int64_t position = pass.batch.positions[row].item<int64_t>();
          const at::Tensor expected = seen.count(row) ? history.attention(pass, row, i, seen[row])
                                                      : history.dense(pass, row, i, position);
          ASSERT_LT(largest_difference(got[row], expected), dtype == at::kFloat ? 1e-5 : 2e-2) << position;
        }
    }
  }
}

TEST(Twilight, CapturedMassCountsSurvivorsOnly) {
  fresh_seed();
  const ModelConfig model = small_model(24, 1, 6, 2, 32);
  LayerHistory history(model, 40, at::kFloat, 1);
  TwilightPolicy policy(model, history.pools(), quest_rule(), 0.6);
  SparseAttention attention(history.cache(), policy);
  attention.forward(history.next({400}).inputs(0, history.scale()));
  const Pass step = history.next({1});
  int64_t events = 0;
  attention.set_observer([&](const SelectionEvent& event) {
    ++events;
    const at::Tensor key = history.keys(0).transpose(0, 1);
    const at::Tensor mass =
        attention_mass(step.query, key, history.scale(), 400, 2, mass_reduction(event.selection));
    const CapturedMass captured = captured_mass(mass, event.selection, event.rule);
    for (int64_t g = 0; g < 2; ++g) {
      double total = 0, residual = 0, all_residual = 0;
      const std::set<int64_t> tokens = attended(event.selection, 0, g, 401);
      at::Tensor mean = at::zeros({401}, at::kDouble);
      for (int64_t h = 3 * g; h < 3 * g + 3; ++h)
        mean += at::softmax(at::mv(key[g], step.query[0][h]).to(at::kDouble) * history.scale(), 0) / 3;
      for (int64_t t = 0; t < 401; ++t) {
        const double weight = mean[t].item<double>();
        const bool reserved = t < 16 || t / 16 >= (401 - 32) / 16;
        total += tokens.count(t) ? weight : 0;
        residual += tokens.count(t) && !reserved ? weight : 0;
        all_residual += reserved ? 0 : weight;
      }
      EXPECT_NEAR(captured.total[0][g].item<double>(), total, 1e-5);
      EXPECT_NEAR(captured.residual[0][g].item<double>(), residual / all_residual, 1e-5);
    }
  });
  attention.forward(step.inputs(0, history.scale()));
  EXPECT_EQ(events, 1);
}

// p = 1 of all blocks drops at most weights that float32 cannot tell from zero.
TEST(Twilight, WholeMassOfAllBlocksIsDenseAttention) {
  fresh_seed();
  const ModelConfig model = small_model(24, 1, 4, 2, 64);
  SelectionRule rule = quest_rule();
  rule.budget = 1 << 20;
  LayerHistory history(model, 40, at::kFloat, 2);
  TwilightPolicy policy(model, history.pools(), rule, 1.0);
  SparseAttention sparse(history.cache(), policy);
  DenseAttention dense(history.cache());
  for (const auto& counts : {std::vector<int64_t>{random_int(200, 400), random_int(1, 20)}, {1, 1}}) {
    const Pass pass = history.next(counts);
    const at::Tensor got = sparse.forward(pass.inputs(0, history.scale()));
    EXPECT_LT(largest_difference(got, dense.forward(pass.inputs(0, history.scale()))), 1e-5);
  }
}

// Equal weights are kept or dropped together, as a threshold can only do, and a key of equal numbers survives
// a scale of zero.
TEST(Twilight, FlatAndEqualKeys) {
  fresh_seed();
  const ModelConfig model = small_model(24, 1, 2, 1, 16);
  LayerHistory history(model, 20, at::kFloat, 1);
  SelectionRule rule = quest_rule();
  rule.budget = 1 << 20;
  TwilightPolicy policy(model, history.pools(), rule, 0.9);
  SparseAttention attention(history.cache(), policy);
  Pass context = history.next({200});
  context.key.fill_(0.25);
  attention.forward(context.inputs(0, 1));
  Pass step = history.next({1});
  step.key.fill_(0.25);
  step.query.fill_(1);
  attention.set_observer(
      [&](const SelectionEvent& event) { EXPECT_EQ(attended(event.selection, 0, 0, 201).size(), 201u); });
  const at::Tensor output = attention.forward(step.inputs(0, 1));
  EXPECT_TRUE(at::isfinite(output).all().item<bool>());
}

TEST(Twilight, RefusesImpossibleMasses) {
  const ModelConfig model = small_model(24, 1, 4, 2, 16);
  LayerHistory history(model, 4, at::kFloat, 1);
  EXPECT_THROW(TwilightPolicy(model, history.pools(), quest_rule(), 0), Error);
  EXPECT_THROW(TwilightPolicy(model, history.pools(), quest_rule(), 1.01), Error);
}
