// The Gated DeltaNet layer against its equations in float64, one token at a time, in plain loops.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "ops/linear_attention/gated_delta.h"

namespace spot {

using namespace ops;
namespace {

struct Shape {
  int64_t key_heads, value_heads, key_dim, value_dim, taps;
  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
};

// Everything a call takes, random, and a pool of states of which the call uses some slots.
struct Case {
  Shape shape;
  std::vector<int64_t> lengths;
  at::Tensor mixed_qkv, z, b, a;
  at::Tensor conv1d, a_log, dt_bias, norm;
  at::Tensor conv_states, recurrent_states, slots;
  GatedDeltaWeights weights;
};

std::vector<double> doubles(const at::Tensor& t) {
  const at::Tensor d = t.to(at::kDouble).contiguous();
  return {d.const_data_ptr<double>(), d.const_data_ptr<double>() + d.numel()};
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

struct Expected {
  std::vector<double> y, conv_states, recurrent_states;
};

// The equations of the header, token by token.
Expected sequential(const Case& c) {
  const Shape s = c.shape;
  const int64_t channels = s.channels(), history = s.taps - 1, keys = s.key_heads * s.key_dim;
  const auto x = doubles(c.mixed_qkv), z = doubles(c.z), b = doubles(c.b), a = doubles(c.a);
  const auto conv = doubles(c.conv1d), a_log = doubles(c.a_log), bias = doubles(c.dt_bias),
             norm = doubles(c.norm);
  Expected e;
  e.conv_states = doubles(c.conv_states);
  e.recurrent_states = doubles(c.recurrent_states);
  const at::Tensor slots = c.slots.contiguous();
  int64_t token = 0;
  for (size_t i = 0; i < c.lengths.size(); ++i) {
    double* past = e.conv_states.data() + slots.const_data_ptr<int64_t>()[i] * history * channels;
    double* states = e.recurrent_states.data() +
                     slots.const_data_ptr<int64_t>()[i] * s.value_heads * s.key_dim * s.value_dim;
    for (int64_t t = 0; t < c.lengths[i]; ++t, ++token) {
      std::vector<double> u(channels);
      for (int64_t j = 0; j < channels; ++j) {
        double sum = conv[j * s.taps + history] * x[token * channels + j];
        for (int64_t n = 0; n < history; ++n) sum += conv[j * s.taps + n] * past[n * channels + j];
        u[j] = sum * sigmoid(sum);
        for (int64_t n = 0; n + 1 < history; ++n) past[n * channels + j] = past[(n + 1) * channels + j];
        past[(history - 1) * channels + j] = x[token * channels + j];
      }
      for (int64_t h = 0; h < s.value_heads; ++h) {
        const int64_t key_head = h / (s.value_heads / s.key_heads);
        std::vector<double> q(u.begin() + key_head * s.key_dim, u.begin() + (key_head + 1) * s.key_dim);
        std::vector<double> k(u.begin() + keys + key_head * s.key_dim,
                              u.begin() + keys + (key_head + 1) * s.key_dim);
        const double* v = u.data() + 2 * keys + h * s.value_dim;
        const double q_norm = std::sqrt(std::inner_product(q.begin(), q.end(), q.begin(), 1e-6));
        const double k_norm = std::sqrt(std::inner_product(k.begin(), k.end(), k.begin(), 1e-6));
        for (double& value : q) value /= q_norm * std::sqrt(static_cast<double>(s.key_dim));
        for (double& value : k) value /= k_norm;
        const double decay = std::exp(-std::exp(a_log[h]) * softplus(a[token * s.value_heads + h] + bias[h]));
        const double beta = sigmoid(b[token * s.value_heads + h]);
        double* state = states + h * s.key_dim * s.value_dim;
        std::vector<double> o(s.value_dim);
        double squares = 0;
        for (int64_t j = 0; j < s.value_dim; ++j) {
          double read = 0;
          for (int64_t n = 0; n < s.key_dim; ++n) {
            state[n * s.value_dim + j] *= decay;
            read += state[n * s.value_dim + j] * k[n];
          }
          for (int64_t n = 0; n < s.key_dim; ++n) {
            state[n * s.value_dim + j] += k[n] * beta * (v[j] - read);
            o[j] += state[n * s.value_dim + j] * q[n];
          }
          squares += o[j] * o[j];
        }
        const double scale = 1 / std::sqrt(squares / s.value_dim + c.weights.norm_epsilon);
        for (int64_t j = 0; j < s.value_dim; ++j) {
          const double gate = z[(token * s.value_heads + h) * s.value_dim + j];
          e.y.push_back(o[j] * scale * norm[j] * gate * sigmoid(gate));
        }
      }
    }
  }
  return e;
}

class GatedDelta : public testing::Test {
 protected:
  void SetUp() override {
    const uint64_t seed = std::random_device()();
    RecordProperty("seed", std::to_string(seed));
    printf("seed %lu\n", seed);
    at::manual_seed(seed);
    random_.seed(seed);
  }

  int64_t draw(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_);
  }

  Case make(Shape s, std::vector<int64_t> lengths, at::ScalarType dtype = at::kFloat) {
    Case c;
    c.shape = s;
    c.lengths = std::move(lengths);
    const int64_t tokens = std::accumulate(c.lengths.begin(), c.lengths.end(), int64_t{0});
    const int64_t sequences = static_cast<int64_t>(c.lengths.size()), num_slots = sequences + draw(0, 3);
    // Columns of one wide projection, so that token strides differ from widths.
    const int64_t values = s.value_heads * s.value_dim;
    const at::Tensor all = at::randn({tokens, s.channels() + values + 2 * s.value_heads}).to(dtype);
    c.mixed_qkv = all.narrow(1, 0, s.channels());
    c.z = all.narrow(1, s.channels(), values);
    c.b = all.narrow(1, s.channels() + values, s.value_heads);
    c.a = all.narrow(1, s.channels() + values + s.value_heads, s.value_heads);
    c.conv1d = at::randn({s.channels(), 1, s.taps}) * 0.5;
    c.a_log =
        at::rand({s.value_heads}) * 10 - 7;  // from remembering thousands of tokens to forgetting at once
    c.dt_bias = at::randn({s.value_heads});
    c.norm = at::randn({s.value_dim}) * 0.3 + 1;
    c.weights = gated_delta_weights(c.conv1d, c.a_log, c.dt_bias, c.norm, 1e-6);
    c.conv_states = at::randn({num_slots, s.taps - 1, s.channels()});
    c.recurrent_states = at::randn({num_slots, s.value_heads, s.key_dim, s.value_dim});
    c.slots = at::randperm(num_slots, at::kLong).narrow(0, 0, sequences);
    return c;
  }

  static void expect_close(const at::Tensor& got, const std::vector<double>& wanted, double bound,
                           const char* what) {
    const std::vector<double> values = doubles(got);
    ASSERT_EQ(values.size(), wanted.size()) << what;
    double difference = 0, size = 0;
    for (size_t i = 0; i < values.size(); ++i) {
      difference += (values[i] - wanted[i]) * (values[i] - wanted[i]);
      size += wanted[i] * wanted[i];
    }
    EXPECT_LE(std::sqrt(difference), bound * std::sqrt(size)) << what;
  }

  // Runs the layer on the case, whose states it changes, against the loops.
  static void check(Case& c, double bound) {
    const Expected wanted = sequential(c);
    const at::Tensor y = gated_delta_layer(
        {c.mixed_qkv, c.z, c.b, c.a, c.weights, c.conv_states, c.recurrent_states, c.slots}, c.lengths);
    EXPECT_EQ(y.scalar_type(), c.mixed_qkv.scalar_type());
    expect_close(y, wanted.y, bound, "output");
    expect_close(c.conv_states, wanted.conv_states, 1e-6, "convolution states");
    expect_close(c.recurrent_states, wanted.recurrent_states, 1e-5, "recurrent states");
  }

  std::mt19937_64 random_;
};

TEST_F(GatedDelta, DecodeIsTheRecurrence) {
  for (const Shape& s :
       {Shape{2, 4, 32, 48, 4}, Shape{3, 3, 17, 9, 4}, Shape{1, 3, 128, 128, 4}, Shape{2, 2, 8, 5, 2}}) {
    Case c = make(s, std::vector<int64_t>(static_cast<size_t>(draw(1, 9)), 1));
    check(c, 1e-5);
  }
}

TEST_F(GatedDelta, PrefillIsTheRecurrence) {
  for (const int64_t length : {2, 3, 63, 64, 65, 129, 200}) {
    SCOPED_TRACE(length);
    Case c = make({2, 4, 24, 40, 4}, {length});
    check(c, 1e-5);
  }
  Case c = make({1, 2, 128, 128, 4}, {draw(2, 150)});
  check(c, 1e-5);
}

TEST_F(GatedDelta, RaggedPrefillKeepsSequencesApart) {
  for (int repeat = 0; repeat < 4; ++repeat) {
    std::vector<int64_t> lengths = {1, 65, 0, draw(2, 200), 64, 3, draw(2, 70)};
    std::shuffle(lengths.begin(), lengths.end(), random_);
    Case c = make({2, 6, 16, 12, 4}, lengths);
    check(c, 1e-5);
  }
}

TEST_F(GatedDelta, Bfloat16InputsAreComputedInFloat32) {
  Case prefill = make({2, 4, 32, 32, 4}, {90, 7}, at::kBFloat16);
  check(prefill, 4e-3);  // the rounding of the result
  Case decode = make({2, 4, 32, 32, 4}, {1, 1, 1}, at::kBFloat16);
  check(decode, 4e-3);
}

TEST_F(GatedDelta, ForgettingHeadsKeepWhatFollows) {
  // Early tokens forget by e^-90 each; the later ones hardly at all. Cumulative sums in float32 would blur
  // the latter.
  Case c = make({1, 1, 32, 32, 4}, {64});
  c.a_log.fill_(0);
  c.dt_bias.fill_(0);
  c.weights = gated_delta_weights(c.conv1d, c.a_log, c.dt_bias, c.norm, 1e-6);
  c.a = at::cat({at::full({32, 1}, 90.f), at::full({32, 1}, -3.f)});
  check(c, 3e-6);
}

TEST_F(GatedDelta, EqualKeysStayStable) {
  Case c = make({1, 2, 32, 16, 4}, {150});
  c.mixed_qkv = (at::randn({1, c.shape.channels()}) * 2).expand({150, c.shape.channels()});
  c.a_log.fill_(-12);
  c.weights = gated_delta_weights(c.conv1d, c.a_log, c.dt_bias, c.norm, 1e-6);
  c.b = at::full({150, 2}, 4.f);
  check(c, 1e-4);
}

TEST_F(GatedDelta, RefusesWhatDoesNotFit) {
  Case c = make({2, 4, 8, 8, 4}, {5, 4});
  const auto run = [&](const std::vector<int64_t>& lengths) {
    gated_delta_layer({c.mixed_qkv, c.z, c.b, c.a, c.weights, c.conv_states, c.recurrent_states, c.slots},
                      lengths);
  };
  EXPECT_NO_THROW(run({5, 4}));
  EXPECT_THROW(run({5, 5}), c10::Error);
  EXPECT_THROW(run({9}), c10::Error);  // two slots, one length
  EXPECT_THROW(run({10, -1}), c10::Error);
  EXPECT_THROW(run(std::vector<int64_t>(2, 1)), c10::Error);
  c.z = c.z.narrow(1, 0, 31);
  EXPECT_THROW(run({5, 4}), c10::Error);
  EXPECT_THROW(gated_delta_weights(c.conv1d, c.a_log, c.dt_bias.narrow(0, 0, 3), c.norm, 1e-6), c10::Error);
}

}  // namespace
}  // namespace spot
