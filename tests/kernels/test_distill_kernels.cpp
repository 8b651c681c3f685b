// kernels/teacher_mass.h, selector_kl.h and top_members.h, on the GPU or emulated, against their formulas in
// float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/selector_kl.h"
#include "kernels/teacher_mass.h"
#include "kernels/top_members.h"
#include "tests/kernels/device.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::kEmulated;
using testing::Typed;

// Norm of the difference over the norm of what is wanted, or over 0.001 where that is less: some sums are 0.
double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    if (!std::isfinite(got[i])) return std::numeric_limits<double>::infinity();
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-6));
}

// Queries `first` .. `first + rows - 1` (every `every`-th) of packed documents, those that see a key besides
// the first `sinks` tokens of their document and the last `recency`, in whole blocks of `block`.
struct Strip {
  std::vector<int32_t> tokens, start, low, last;
  int32_t first_key, width, num_tokens;

  Strip(int num_tokens_, const std::vector<int>& starts, int first, int rows, int every = 1, int sinks = 0,
        int recency = 0, int block = 1)
      : num_tokens(num_tokens_) {
    for (int r = 0; r < rows; ++r) {
      const int token = first + r * every,
                begin = *(std::upper_bound(starts.begin(), starts.end(), token) - 1);
      const int from = begin + (sinks + block - 1) / block * block,
                to = begin + std::max(0, token - begin + 1 - recency) / block * block;
      if (to <= from) continue;
      tokens.push_back(token);
      start.push_back(begin);
      low.push_back(from);
      last.push_back(to - 1);
    }
    if (tokens.empty()) return;
    first_key = low.front();
    width = (last.back() + 1 - first_key + 7) / 8 * 8;
  }
  int rows() const { return static_cast<int>(tokens.size()); }
  bool sees(int row, int column) const {
    return first_key + column >= low[row] && first_key + column <= last[row];
  }
};
struct DeviceStrip {
  explicit DeviceStrip(const Strip& s)
      : tokens(s.tokens), low(s.low), last(s.last), strip{tokens.data(), low.data(), last.data(), s.rows(),
                                                          s.first_key,   s.width,    s.num_tokens} {}
  Buffer<int32_t> tokens, low, last;
  QueryStrip strip;
};

class DistillKernels : public ::testing::Test {
 protected:
  void SetUp() override { random_.seed(testing::fresh_seed()); }
  std::vector<float> normals(size_t count, double scale = 1) {
    std::vector<float> v(count);
    for (float& x : v) x = static_cast<float>(scale * std::normal_distribution<double>()(random_));
    return v;
  }
  int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  std::vector<int> draw_starts(int num_tokens, int longest) {
    std::vector<int> starts;
    for (int start = 0; start < num_tokens; start += draw(1, longest)) starts.push_back(start);
    return starts;
  }
  // As a residual teacher has them.
  Strip draw_residual(int num_tokens, int longest, int first, int rows) {
    return Strip(num_tokens, draw_starts(num_tokens, longest), first, rows, 1, draw(0, 40), draw(0, 70),
                 draw(1, 16));
  }

  void expect_teacher(const Strip& s, DataType type, int num_heads, int num_kv_heads, int dim, int groups) {
    SCOPED_TRACE(std::string(type == DataType::kBf16 ? "bf16" : "f16") + ", tokens " +
                 std::to_string(s.num_tokens) + ", rows " + std::to_string(s.rows()) + ", heads " +
                 std::to_string(num_heads) + "/" + std::to_string(num_kv_heads) + " of " +
                 std::to_string(dim) + ", groups " + std::to_string(groups));
    const Typed query(type, normals(static_cast<size_t>(s.num_tokens) * num_heads * dim));
    const Typed key(type, normals(static_cast<size_t>(s.num_tokens) * num_kv_heads * dim));
    const float scale = static_cast<float>(1.5 / std::sqrt(dim));
    std::vector<double> want(static_cast<size_t>(s.rows()) * groups * s.width, 0.0);
    std::vector<float> logsumexp(static_cast<size_t>(num_heads) * s.num_tokens, std::nanf(""));
    for (int r = 0; r < s.rows(); ++r)
      for (int h = 0; h < num_heads; ++h) {
        std::vector<double> logits;
        double sum = 0;
        for (int t = s.start[r]; t <= s.tokens[r]; ++t) {
          double dot = 0;
          for (int d = 0; d < dim; ++d)
            dot += static_cast<double>(
                       query.values[(static_cast<size_t>(s.tokens[r]) * num_heads + h) * dim + d]) *
                   key.values[(static_cast<size_t>(t) * num_kv_heads + h / (num_heads / num_kv_heads)) * dim +
                              d];
          logits.push_back(scale * dot);
          sum += std::exp(logits.back());
        }
        logsumexp[static_cast<size_t>(h) * s.num_tokens + s.tokens[r]] = static_cast<float>(std::log(sum));
        for (int t = s.low[r]; t <= s.last[r]; ++t)
          want[(static_cast<size_t>(r) * groups + h * groups / num_heads) * s.width + t - s.first_key] +=
              std::exp(logits[t - s.start[r]]) / sum * groups / num_heads;
      }
    const DeviceStrip strip(s);
    const int chunks = (s.width + mass_chunk(dim) - 1) / mass_chunk(dim);
    const Buffer<uint8_t> q(query.bytes), k(key.bytes);
    const Buffer<float> lse(logsumexp), mass(want.size()),
        chunk_sums(static_cast<size_t>(s.rows()) * groups * chunks);
    TeacherMassParams p;
    p.data_type = type;
    p.strip = strip.strip;
    p.num_heads = num_heads;
    p.num_kv_heads = num_kv_heads;
    p.head_dim = dim;
    p.groups = groups;
    p.scale = scale;
    p.query = q.data();
    p.key = k.data();
    p.query_token_stride = num_heads * dim;
    p.key_token_stride = num_kv_heads * dim;
    p.query_head_stride = p.key_head_stride = dim;
    p.logsumexp = lse.data();
    p.logsumexp_head_stride = s.num_tokens;
    p.mass = mass.data();
    p.chunk_sums = chunk_sums.data();
    check(teacher_mass(p, nullptr));
    const std::vector<float> got = mass.download();
    EXPECT_LE(relative_error({got.begin(), got.end()}, want), 1e-5);
    for (int r = 0; r < s.rows(); ++r)
      for (int g = 0; g < groups; ++g)
        for (int c = 0; c < s.width; ++c)
          ASSERT_TRUE(s.sees(r, c) || got[(static_cast<size_t>(r) * groups + g) * s.width + c] == 0.0f)
              << r << " " << c;
    const std::vector<float> sums = chunk_sums.download();
    for (size_t row = 0; row < static_cast<size_t>(s.rows()) * groups; ++row)
      for (int chunk = 0; chunk < chunks; ++chunk) {
        double sum = 0;
        for (int c = chunk * mass_chunk(dim); c < std::min(s.width, (chunk + 1) * mass_chunk(dim)); ++c)
          sum += got[row * s.width + c];
        ASSERT_NEAR(sums[row * chunks + chunk], sum, 1e-6 * sum) << "row " << row << ", chunk " << chunk;
      }
  }

  void expect_divergence(const Strip& s, int key_heads, bool gradient, int k_train = 0) {
    SCOPED_TRACE("tokens " + std::to_string(s.num_tokens) + ", rows " + std::to_string(s.rows()) +
                 ", width " + std::to_string(s.width) + ", key heads " + std::to_string(key_heads) +
                 ", k_train " + std::to_string(k_train));
    constexpr int H = kSelectorHeads, D = kKeyDim;
    // Then student and teacher are both 1, and what is left of their difference is rounding.
    const bool one_key = k_train == 1 || std::equal(s.low.begin(), s.low.end(), s.last.begin());
    const Typed query(DataType::kBf16, normals(static_cast<size_t>(s.num_tokens) * H * D));
    const Typed key(DataType::kBf16, normals(static_cast<size_t>(s.num_tokens) * key_heads * D));
    const std::vector<float> weight = normals(static_cast<size_t>(s.num_tokens) * H, 0.1);
    const size_t area = static_cast<size_t>(s.rows()) * s.width;
    std::vector<float> mass(area, 0.0f);
    std::vector<float> totals(s.rows(), 0.0f);
    for (int r = 0; r < s.rows(); ++r) {
      // Attention sees more keys than the row: of its mass the row may have any share, or none.
      const double share = r % 7 == 3 ? 0.0 : std::exp2(-draw(0, 20));
      double sum = 0;
      for (const bool write : {false, true})
        for (int c = 0; c < s.width; ++c) {
          if (!s.sees(r, c)) continue;
          float& m = mass[static_cast<size_t>(r) * s.width + c];
          if (!write)
            sum += m = static_cast<float>(std::exp(2 * std::normal_distribution<double>()(random_)));
          else
            totals[r] += m = static_cast<float>(m / sum * share);
        }
    }
    const int chunks = (s.width + kKlChunk - 1) / kKlChunk;
    const DeviceStrip strip(s);
    const Buffer<uint8_t> q(query.bytes), k(key.bytes);
    const Buffer<float> w(weight), m(mass), total(totals), partial(static_cast<size_t>(s.rows()) * chunks),
        sums(static_cast<size_t>(s.rows()) * chunks * kKlSums), scores_out(area), entropy(s.rows());
    const Buffer<uint16_t> dots(area * H);
    SelectorKlParams p;
    p.strip = strip.strip;
    p.key_heads = key_heads;
    p.query = q.data();
    p.key = k.data();
    p.weight = w.data();
    p.query_token_stride = H * D;
    p.key_token_stride = key_heads * D;
    p.query_head_stride = p.key_head_stride = D;
    p.mass = m.data();
    p.total = k_train > 0 ? nullptr : total.data();
    p.chunk_logsumexp = partial.data();
    p.sums = sums.data();
    // Heads inside rows where they share a key, else heads first, as the operator has it.
    const bool inside = key_heads == 1;
    p.dots_grad = gradient ? dots.data() : nullptr;
    p.dots_grad_row_stride = inside ? int64_t{H} * s.width : s.width;
    p.dots_grad_head_stride = inside ? s.width : static_cast<int64_t>(s.rows()) * s.width;
    p.k_train = k_train;
    p.scores = scores_out.data();
    p.entropy = entropy.data();
    check(selector_kl(p, nullptr));
    const std::vector<float> stored = scores_out.download();
    std::vector<double> want_dots(area * H, 0.0), want_sums(static_cast<size_t>(s.rows()) * 8, 0.0);
    for (int r = 0; r < s.rows(); ++r) {
      std::vector<double> scores(s.width), relu(static_cast<size_t>(s.width) * H);
      double sum = 0;
      for (int c = 0; c < s.width; ++c) {
        if (!s.sees(r, c)) continue;
        for (int h = 0; h < H; ++h) {
          double dot = 0;
          for (int d = 0; d < D; ++d)
            dot += static_cast<double>(query.values[(static_cast<size_t>(s.tokens[r]) * H + h) * D + d]) *
                   key.values[(static_cast<size_t>(s.first_key + c) * key_heads + h % key_heads) * D + d];
          relu[static_cast<size_t>(c) * H + h] = std::max(dot, 0.0);
          scores[c] += weight[static_cast<size_t>(s.tokens[r]) * H + h] * std::max(dot, 0.0);
        }
      }
      // Which keys count: by the scores as the device has them, which are near the true ones.
      const float* own = &stored[static_cast<size_t>(r) * s.width];
      std::vector<int> order;
      for (int c = 0; c < s.width; ++c)
        if (s.sees(r, c)) {
          order.push_back(c);
          ASSERT_NEAR(own[c], scores[c] / std::log(2.0), 1e-4);
        }
      std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return own[x] > own[y]; });
      if (k_train > 0 && order.size() > static_cast<size_t>(k_train)) order.resize(k_train);
      std::vector<bool> counts(s.width, false);
      double kept = 0;
      for (const int c : order) {
        counts[c] = true;
        sum += std::exp(scores[c]);
        kept += mass[static_cast<size_t>(r) * s.width + c];
      }
      if (kept == 0) continue;  // no loss and no gradient
      double* w = &want_sums[static_cast<size_t>(r) * 8];
      for (int c = 0; c < s.width; ++c) {
        if (!counts[c]) continue;
        const double student = std::exp(scores[c]) / sum,
                     t = mass[static_cast<size_t>(r) * s.width + c] / kept;
        w[0] += t * (std::log(t) - scores[c] + std::log(sum));
        w[1] += t * std::log(t);
        w[2] += t;
        for (int h = 0; h < H; ++h) {
          const double value = relu[static_cast<size_t>(c) * H + h];
          w[4 + h] += (student - t) * value;
          if (value > 0)
            want_dots[(static_cast<size_t>(h) * s.rows() + r) * s.width + c] =
                weight[static_cast<size_t>(s.tokens[r]) * H + h] * (student - t);
        }
      }
    }
    const std::vector<float> raw = sums.download();
    std::vector<double> got_sums(want_sums.size(), 0.0);
    for (int r = 0; r < s.rows(); ++r)
      for (int c = 0; c < chunks; ++c)
        for (int i = 0; i < kKlSums; ++i)
          got_sums[static_cast<size_t>(r) * 8 + i] +=
              raw[(static_cast<size_t>(r) * chunks + c) * kKlSums + i];
    for (int i = 0; i < kKlSums; ++i) {
      std::vector<double> got, want;
      for (int r = 0; r < s.rows(); ++r) {
        got.push_back(got_sums[static_cast<size_t>(r) * 8 + i]);
        want.push_back(want_sums[static_cast<size_t>(r) * 8 + i]);
      }
      SCOPED_TRACE("sum " + std::to_string(i));
      if (one_key && i != 2) {
        for (const double x : got) ASSERT_NEAR(x, 0.0, 5e-5);
        continue;
      }
      // A divergence may be small beside the logarithms that it is the difference of.
      double off = 0, size = 0;
      for (size_t r = 0; r < want.size(); ++r)
        off += std::pow(got[r] - want[r], 2), size += std::pow(want[r], 2);
      EXPECT_LE(std::sqrt(off), 2e-5 * std::sqrt(size) + 2e-6 * std::sqrt(static_cast<double>(want.size())));
    }
    if (!gradient) return;
    const std::vector<double> bits = testing::to_double(DataType::kBf16, dots.download());
    std::vector<double> got_dots(want_dots.size());
    for (int h = 0; h < H; ++h)
      for (int r = 0; r < s.rows(); ++r)
        for (int c = 0; c < s.width; ++c) {
          const double value =
              bits[static_cast<size_t>(r * p.dots_grad_row_stride + h * p.dots_grad_head_stride + c)];
          got_dots[(static_cast<size_t>(h) * s.rows() + r) * s.width + c] = value;
          ASSERT_TRUE(s.sees(r, c) || value == 0.0) << h << " " << r << " " << c;
        }
    if (one_key) {
      for (const double x : got_dots) ASSERT_NEAR(x, 0.0, 1e-5);
      return;
    }
    // bf16 keeps 8 bits: 2^-9 at most, each; the difference of shares that are nearly equal loses as much again.
    EXPECT_LE(relative_error(got_dots, want_dots), 6e-3);
  }

  std::mt19937 random_;
};

TEST_F(DistillKernels, TeacherOfEveryHeadDimAndType) {
  for (const int dim : {64, 128, 256})
    for (const DataType type : {DataType::kBf16, DataType::kF16})
      expect_teacher(Strip(301, {0, 37, 290}, draw(0, 60), 141), type, 4, 2, dim, 1);
}

TEST_F(DistillKernels, TeacherOfGroupsAndSharedHeads) {
  for (const int heads_per_key : {1, 2, 3, 5, 8})
    for (const int groups : {1, 2})
      expect_teacher(Strip(97, {0}, 8, 70), DataType::kBf16, 2 * heads_per_key, 2, 64, groups);
  expect_teacher(Strip(70, {0}, 0, 70), DataType::kBf16, 4, 4, 128, 4);
  expect_teacher(Strip(70, {0}, 0, 70), DataType::kBf16, 3, 1, 256, 1);
}

TEST_F(DistillKernels, TeacherOfManyTilesAndDocuments) {
  expect_teacher(Strip(700, {0}, 530, 170), DataType::kBf16, 2, 1, 64, 1);  // tiles left of the diagonal
  expect_teacher(Strip(700, {0, 600}, 500, 200), DataType::kBf16, 2, 1, 256, 1);
  expect_teacher(Strip(900, {0}, 3, 20, 40), DataType::kBf16, 2, 2, 128, 1);  // a sample of the queries
  for (int trial = 0; trial < 4; ++trial) {
    const int tokens = draw(1, 400), first = draw(0, tokens - 1);
    expect_teacher(Strip(tokens, draw_starts(tokens, 90), first, draw(1, tokens - first)), DataType::kBf16, 2,
                   1, 64, 1);
  }
}

TEST_F(DistillKernels, TeacherOfAPartOfTheKeys) {
  expect_teacher(Strip(700, {0}, 400, 200, 1, 128, 256, 64), DataType::kBf16, 4, 2, 64, 2);
  expect_teacher(Strip(700, {0, 310}, 290, 300, 1, 33, 70, 16), DataType::kF16, 2, 1, 256, 1);
  expect_teacher(Strip(900, {0}, 3, 40, 20, 100, 1, 8), DataType::kBf16, 2, 2, 128, 1);
  for (int trial = 0; trial < 6; ++trial) {
    const int tokens = draw(80, 400), first = draw(0, tokens - 1);
    const Strip s = draw_residual(tokens, 200, first, draw(1, tokens - first));
    if (s.rows() > 0) expect_teacher(s, DataType::kBf16, 2, 1, trial % 2 ? 64 : 256, 1);
  }
}

TEST_F(DistillKernels, DivergenceOverAPartOfTheKeys) {
  for (const int key_heads : {1, 4})
    for (const int k_train : {0, 40}) {
      expect_divergence(Strip(700, {0}, 400, 150, 1, 128, 256, 64), key_heads, true, k_train);
      expect_divergence(Strip(1300, {0, 310}, 290, 20, 50, 33, 70, 16), key_heads, true, k_train);
      for (int trial = 0; trial < 2; ++trial) {
        const int tokens = draw(80, 400), first = draw(0, tokens - 1);
        const Strip s = draw_residual(tokens, 200, first, draw(1, tokens - first));
        if (s.rows() > 0) expect_divergence(s, key_heads, true, k_train);
      }
    }
}

TEST_F(DistillKernels, DivergenceOfPackedDocuments) {
  for (const int key_heads : {1, 4}) {
    expect_divergence(Strip(1, {0}, 0, 1), key_heads, true);
    expect_divergence(Strip(201, {0, 33, 190}, 5, 150), key_heads, true);
    expect_divergence(Strip(201, {0}, 5, 150), key_heads, false);
    for (int trial = 0; trial < 4; ++trial) {
      const int tokens = draw(1, 400), first = draw(0, tokens - 1);
      expect_divergence(Strip(tokens, draw_starts(tokens, 120), first, draw(1, tokens - first)), key_heads,
                        true);
    }
  }
}

TEST_F(DistillKernels, DivergenceOverManyChunks) {
  for (const int key_heads : {1, 4}) {
    expect_divergence(Strip(1300, {0}, 1150, 140), key_heads, true);
    expect_divergence(Strip(1300, {0, 1100}, 1050, 200), key_heads, true);
    expect_divergence(Strip(1600, {0, 700}, 2, 16, 100), key_heads, true);
  }
}

TEST_F(DistillKernels, DivergenceOfTheStudentsOwnTopKeys) {
  for (const int key_heads : {1, 4}) {
    expect_divergence(Strip(301, {0, 90}, 70, 40), key_heads, true, 1);
    expect_divergence(Strip(301, {0, 90}, 80, 20, 10), key_heads, true, 57);
    expect_divergence(Strip(1300, {0}, 1280, 20), key_heads, true, 650);
    expect_divergence(Strip(201, {0}, 5, 10), key_heads, true, 1000);  // all
  }
}

TEST_F(DistillKernels, TopMembersAmongTies) {
  for (int trial = 0; trial < (kEmulated ? 8 : 60); ++trial) {
    const int num_tokens = draw(1, 700), first = draw(0, num_tokens - 1);
    const Strip s =
        trial % 2 ? Strip(num_tokens, draw_starts(num_tokens, 300), first, std::min(num_tokens - first, 10))
                  : draw_residual(num_tokens, 300, first, std::min(num_tokens - first, 10));
    if (s.rows() == 0) continue;
    const int k = draw(1, 200), levels = draw(1, 12), stride = draw(1, 3);
    const size_t area = static_cast<size_t>(s.rows()) * s.width;
    std::vector<float> scores(area), mass(area);
    for (size_t i = 0; i < area; ++i) {
      scores[i] = static_cast<float>(draw(-levels, levels)) / 4;
      mass[i] = static_cast<float>(draw(0, 9)) / 64;
    }
    const DeviceStrip strip(s);
    const Buffer<float> device_scores(scores), device_mass(mass), logsumexp(s.rows() * stride),
        entropy(s.rows());
    check(top_members(
        {strip.strip, k, device_scores.data(), device_mass.data(), logsumexp.data(), stride, entropy.data()},
        nullptr));
    const std::vector<float> got = device_mass.download(), sums = logsumexp.download(),
                             entropies = entropy.download();
    for (int r = 0; r < s.rows(); ++r) {
      const size_t row = static_cast<size_t>(r) * s.width;
      std::vector<int> order;
      double total = 0, information = 0, kept = 0, sum = 0;
      for (int c = 0; c < s.width; ++c)
        if (s.sees(r, c)) {
          order.push_back(c);
          total += mass[row + c];
          if (mass[row + c] > 0) information += mass[row + c] * std::log(mass[row + c]);
        }
      std::stable_sort(order.begin(), order.end(),
                       [&](int x, int y) { return scores[row + x] > scores[row + y]; });
      for (size_t i = 0; i < order.size() && i < static_cast<size_t>(k); ++i) {
        kept += mass[row + order[i]];
        sum += std::exp2(scores[row + order[i]]);
      }
      for (size_t i = 0; i < order.size(); ++i) {
        const bool member = i < static_cast<size_t>(k) && kept > 0;
        ASSERT_NEAR(got[row + order[i]], member ? mass[row + order[i]] / kept : -1.0, 1e-6)
            << "row " << r << ", place " << i;
      }
      EXPECT_NEAR(sums[r * stride], std::log2(sum), 1e-5);
      for (int i = 1; i < stride; ++i)
        EXPECT_EQ(sums[r * stride + i], -std::numeric_limits<float>::infinity());
      EXPECT_NEAR(entropies[r], total > 0 ? std::log(total) - information / total : 0.0, 1e-5);
    }
  }
}

TEST_F(DistillKernels, RefusesWhatItDoesNotTake) {
  TeacherMassParams teacher;
  EXPECT_EQ(teacher_mass(teacher, nullptr), cudaErrorInvalidValue);
  const DeviceStrip strip(Strip(16, {0}, 0, 16));
  const Buffer<float> storage(1 << 16);
  teacher.strip = strip.strip;
  teacher.num_heads = teacher.num_kv_heads = 1;
  teacher.head_dim = 96;
  teacher.query = teacher.key = storage.data();
  teacher.query_token_stride = teacher.key_token_stride = teacher.query_head_stride =
      teacher.key_head_stride = 96;
  teacher.logsumexp = teacher.mass = teacher.chunk_sums = storage.data();
  EXPECT_EQ(teacher_mass(teacher, nullptr), cudaErrorInvalidValue);
  SelectorKlParams student;
  student.strip = teacher.strip;
  student.key_heads = 2;
  student.query = student.key = student.weight = storage.data();
  student.mass = student.chunk_logsumexp = student.sums = storage.data();
  student.total = storage.data();
  EXPECT_EQ(selector_kl(student, nullptr), cudaErrorInvalidValue);
  student.key_heads = 1;
  student.total = nullptr;  // wanted by the dense loss
  EXPECT_EQ(selector_kl(student, nullptr), cudaErrorInvalidValue);
  student.total = storage.data();
  student.strip.last = nullptr;
  EXPECT_EQ(selector_kl(student, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace spot::kernels
