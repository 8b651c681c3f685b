// kernels/gated_delta.h, on the GPU or emulated, against the equations in float64 on the host, one token at a
// time.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>

#include "kernels/gated_delta.h"
#include "tests/kernels/device.h"

namespace spot::kernels {
namespace {

using testing::Buffer;
using testing::check;
using testing::kEmulated;

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}
double softplus(double x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

// What a comparison runs: a decode step, or a prefill with tiles of so many value columns.
constexpr int kDecode = -1, kAnyTile = 0, kNarrow = 16, kWide = 32;

// A number as the device stores it, both ways.
template <typename T>
T stored(double x) {
  return T(static_cast<float>(x));
}
template <typename T>
double loaded(T x) {
  return static_cast<double>(static_cast<float>(x));
}

// A layer with random weights, its pools of states, and the pools as the equations leave them.
struct Layer {
  int key_heads, value_heads, num_slots;
  std::vector<float> conv, decay_rate, dt_bias, norm;
  std::vector<float> conv_states, recurrent_states;              // as given to the device
  std::vector<double> expected_conv_states, expected_recurrent;  // advanced by expect()
  int64_t channels() const { return int64_t{kDeltaDim} * (2 * key_heads + value_heads); }
};

// One call's inputs, rows wider than the widths in use.
struct Inputs {
  int64_t tokens, stride;
  std::vector<double> rows;  // [T, stride]: channels | z | b | a | padding
  std::vector<int> lengths;
  std::vector<int64_t> slots;
};

class GatedDeltaKernels : public ::testing::Test {
 protected:
  void SetUp() override { random_.seed(testing::fresh_seed()); }

  double normal() { return std::normal_distribution<double>()(random_); }
  int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_); }
  std::vector<float> normals(size_t count, double scale = 1, double mean = 0) {
    std::vector<float> v(count);
    for (float& x : v) x = static_cast<float>(mean + scale * normal());
    return v;
  }

  Layer make_layer(int key_heads, int value_heads, int num_slots) {
    Layer l;
    l.key_heads = key_heads;
    l.value_heads = value_heads;
    l.num_slots = num_slots;
    l.conv = normals(kDeltaTaps * l.channels(), 0.5);
    // From heads that remember thousands of tokens to heads that forget within one.
    for (int h = 0; h < value_heads; ++h)
      l.decay_rate.push_back(
          static_cast<float>(std::exp(std::uniform_real_distribution<double>(-7, 3)(random_))));
    l.dt_bias = normals(value_heads);
    l.norm = normals(kDeltaDim, 0.3, 1);
    l.conv_states = normals(num_slots * 3 * l.channels());
    l.recurrent_states = normals(size_t(num_slots) * value_heads * kDeltaDim * kDeltaDim, 0.3);
    l.expected_conv_states.assign(l.conv_states.begin(), l.conv_states.end());
    l.expected_recurrent.assign(l.recurrent_states.begin(), l.recurrent_states.end());
    return l;
  }

  template <typename T>
  Inputs make_inputs(const Layer& l, std::vector<int> lengths) {
    Inputs in;
    in.tokens = std::accumulate(lengths.begin(), lengths.end(), 0);
    in.lengths = std::move(lengths);
    in.stride = l.channels() + l.value_heads * (kDeltaDim + 2);
    in.stride += 8 - in.stride % 4;
    in.rows.resize(in.tokens * in.stride);
    for (double& x : in.rows) x = loaded(stored<T>(normal()));
    std::vector<int64_t> slots(l.num_slots);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random_);
    in.slots.assign(slots.begin(), slots.begin() + in.lengths.size());
    return in;
  }

  // The equations of src/model/gated_delta.h; advances the layer's expected states.
  static std::vector<double> expect(Layer& l, const Inputs& in) {
    const int64_t channels = l.channels();
    std::vector<double> y;
    int64_t token = 0;
    for (size_t i = 0; i < in.lengths.size(); ++i) {
      double* past = l.expected_conv_states.data() + in.slots[i] * 3 * channels;
      double* states = l.expected_recurrent.data() + in.slots[i] * l.value_heads * kDeltaDim * kDeltaDim;
      for (int t = 0; t < in.lengths[i]; ++t, ++token) {
        const double* x = in.rows.data() + token * in.stride;
        const double *z = x + channels, *b = z + l.value_heads * kDeltaDim, *a = b + l.value_heads;
        std::vector<double> u(channels);
        for (int64_t c = 0; c < channels; ++c) {
          const double sum = l.conv[c] * past[c] + l.conv[channels + c] * past[channels + c] +
                             l.conv[2 * channels + c] * past[2 * channels + c] +
                             l.conv[3 * channels + c] * x[c];
          u[c] = sum * sigmoid(sum);
        }
        std::copy(past + channels, past + 3 * channels, past);
        std::copy(x, x + channels, past + 2 * channels);
        for (int h = 0; h < l.value_heads; ++h) {
          const int key_head = h / (l.value_heads / l.key_heads);
          const double *q = &u[key_head * kDeltaDim], *k = &u[(l.key_heads + key_head) * kDeltaDim],
                       *v = &u[(2 * l.key_heads + h) * kDeltaDim];
          const double q_scale =
              1 / std::sqrt(std::inner_product(q, q + kDeltaDim, q, 1e-6)) / std::sqrt(double{kDeltaDim});
          const double k_scale = 1 / std::sqrt(std::inner_product(k, k + kDeltaDim, k, 1e-6));
          const double decay = std::exp(-l.decay_rate[h] * softplus(a[h] + l.dt_bias[h])),
                       beta = sigmoid(b[h]);
          double* state = states + h * kDeltaDim * kDeltaDim;
          std::vector<double> read(kDeltaDim), o(kDeltaDim);
          for (int n = 0; n < kDeltaDim; ++n)
            for (int j = 0; j < kDeltaDim; ++j)
              read[j] += (state[n * kDeltaDim + j] *= decay) * k[n] * k_scale;
          for (int n = 0; n < kDeltaDim; ++n)
            for (int j = 0; j < kDeltaDim; ++j)
              o[j] += (state[n * kDeltaDim + j] += k[n] * k_scale * beta * (v[j] - read[j])) * q[n] * q_scale;
          const double mean = std::inner_product(o.begin(), o.end(), o.begin(), 0.0) / kDeltaDim;
          for (int j = 0; j < kDeltaDim; ++j) {
            const double gate = z[h * kDeltaDim + j];
            y.push_back(o[j] / std::sqrt(mean + 1e-6) * l.norm[j] * gate * sigmoid(gate));
          }
        }
      }
    }
    return y;
  }

  static void expect_close(const std::vector<double>& got, const std::vector<double>& wanted, double bound,
                           const char* what) {
    ASSERT_EQ(got.size(), wanted.size()) << what;
    double difference = 0, size = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      difference += (got[i] - wanted[i]) * (got[i] - wanted[i]);
      size += wanted[i] * wanted[i];
    }
    EXPECT_LE(std::sqrt(difference), bound * std::sqrt(size))
        << what << ": relative error " << std::sqrt(difference / size);
  }

  // The layer's device copies and the parameters of a call on `in`.
  template <typename T>
  struct Device {
    Buffer<float> conv, decay_rate, dt_bias, norm, conv_states, recurrent_states;
    Buffer<T> rows, output;
    Buffer<int64_t> slots;
    Buffer<int32_t> starts, chunk_starts, chunk_sequences;
    Buffer<float> workspace;
    GatedDeltaParams params;

    static std::vector<T> as_stored(const std::vector<double>& v) {
      std::vector<T> out;
      for (const double x : v) out.push_back(stored<T>(x));
      return out;
    }
    // starts, chunk_starts and chunk_sequences of the lengths.
    static std::vector<int32_t> table(const std::vector<int>& lengths, int which) {
      std::vector<int32_t> starts = {0}, chunks = {0}, sequences;
      for (size_t i = 0; i < lengths.size(); ++i) {
        starts.push_back(starts.back() + lengths[i]);
        chunks.push_back(chunks.back() + (lengths[i] + kDeltaChunk - 1) / kDeltaChunk);
        sequences.resize(chunks.back(), static_cast<int32_t>(i));
      }
      return which == 0 ? starts : which == 1 ? chunks : sequences;
    }

    Device(const Layer& l, const Inputs& in)
        : conv(l.conv),
          decay_rate(l.decay_rate),
          dt_bias(l.dt_bias),
          norm(l.norm),
          conv_states(l.conv_states),
          recurrent_states(l.recurrent_states),
          rows(as_stored(in.rows)),
          output(static_cast<size_t>(in.tokens * l.value_heads * kDeltaDim)),
          slots(in.slots),
          starts(table(in.lengths, 0)),
          chunk_starts(table(in.lengths, 1)),
          chunk_sequences(table(in.lengths, 2)),
          workspace(workspace_floats(l, in)) {
      params = shape_of(l, in);
      const T* x = rows.data();
      params.mixed_qkv = x;
      params.z = x + l.channels();
      params.b = x + l.channels() + l.value_heads * kDeltaDim;
      params.a = x + l.channels() + l.value_heads * (kDeltaDim + 1);
      params.mixed_qkv_stride = params.z_stride = params.b_stride = params.a_stride = in.stride;
      params.conv = conv.data();
      params.decay_rate = decay_rate.data();
      params.dt_bias = dt_bias.data();
      params.norm = norm.data();
      params.conv_states = conv_states.data();
      params.recurrent_states = recurrent_states.data();
      params.state_slots = slots.data();
      params.output = output.data();
      params.workspace = workspace.data();
      params.query_starts = starts.data();
      params.chunk_starts = chunk_starts.data();
      params.chunk_sequences = chunk_sequences.data();
    }
    static GatedDeltaParams shape_of(const Layer& l, const Inputs& in) {
      GatedDeltaParams p;
      p.data_type = sizeof(T) == 4                          ? DataType::kF32
                    : std::is_same<T, __nv_bfloat16>::value ? DataType::kBf16
                                                            : DataType::kF16;
      p.num_key_heads = l.key_heads;
      p.num_value_heads = l.value_heads;
      p.num_tokens = in.tokens;
      p.num_sequences = static_cast<int32_t>(in.lengths.size());
      p.num_chunks = table(in.lengths, 1).back();
      return p;
    }
    static size_t workspace_floats(const Layer& l, const Inputs& in) {
      const GatedDeltaParams p = shape_of(l, in);
      return std::max(gated_delta_decode_workspace(p), gated_delta_prefill_workspace(p)) / sizeof(float);
    }
  };

  template <typename T>
  static std::vector<double> doubles(const Buffer<T>& device) {
    std::vector<double> out;
    for (const T x : device.download()) out.push_back(loaded(x));
    return out;
  }

  // One call on the device, which also takes over the states for the next; against the equations.
  template <typename T>
  static void compare(Layer& l, const Inputs& in, int mode, double bound, double state_bound = 2e-5) {
    const std::vector<double> wanted = expect(l, in);
    Device<T> device(l, in);
    device.params.scan_columns = std::max(mode, 0);
    check(mode == kDecode ? gated_delta_decode(device.params, nullptr)
                          : gated_delta_prefill(device.params, nullptr));
    expect_close(doubles(device.output), wanted, bound, "output");
    l.conv_states = device.conv_states.download();
    l.recurrent_states = device.recurrent_states.download();
    expect_close(doubles(device.conv_states), l.expected_conv_states, 1e-7, "convolution states");
    expect_close(doubles(device.recurrent_states), l.expected_recurrent, state_bound, "recurrent states");
  }

  std::mt19937_64 random_;
};

// The emulator takes about a second for a chunk of a few heads: it gets smaller shapes.
using Heads = std::pair<int, int>;

TEST_F(GatedDeltaKernels, Decode) {
  std::vector<Heads> shapes = {{1, 1}, {2, 4}};
  if (!kEmulated) shapes.insert(shapes.end(), {{3, 9}, {16, 16}, {16, 48}});
  for (const auto& [key_heads, value_heads] : shapes) {
    SCOPED_TRACE(value_heads);
    Layer l = make_layer(key_heads, value_heads, 5);
    for (int step = 0; step < 3; ++step)
      compare<float>(l, make_inputs<float>(l, std::vector<int>(draw(1, 4), 1)), kDecode, 2e-5);
  }
}

TEST_F(GatedDeltaKernels, PrefillOfOddLengths) {
  for (const int length : {1, 2, 3, 63, 64, 65, 200})
    for (const int columns : {kNarrow, kWide}) {
      if (kEmulated && (length == 200) != (columns == kNarrow)) continue;
      SCOPED_TRACE(length);
      Layer l = make_layer(1, 2, 2);
      compare<float>(l, make_inputs<float>(l, {length}), columns, 2e-5);
    }
}

TEST_F(GatedDeltaKernels, PrefillOfSeveralHeadCounts) {
  std::vector<Heads> shapes = {{1, 1}, {2, 2}, {1, 4}};
  if (!kEmulated) shapes.insert(shapes.end(), {{2, 6}, {1, 7}, {16, 16}, {16, 32}, {16, 48}});
  for (const auto& [key_heads, value_heads] : shapes) {
    SCOPED_TRACE(value_heads);
    Layer l = make_layer(key_heads, value_heads, 1);
    compare<float>(l, make_inputs<float>(l, {draw(66, kEmulated ? 70 : 500)}), kAnyTile, 2e-5);
  }
}

TEST_F(GatedDeltaKernels, RaggedPrefillThenDecode) {
  Layer l = kEmulated ? make_layer(1, 2, 6) : make_layer(4, 8, 9);
  std::vector<int> lengths = {1, 65, 0, 3};
  if (!kEmulated) lengths.insert(lengths.end(), {64, 130, draw(2, 200)});
  std::shuffle(lengths.begin(), lengths.end(), random_);
  compare<float>(l, make_inputs<float>(l, lengths), kWide, 2e-5);
  compare<float>(l, make_inputs<float>(l, {7, 70, 2}), kNarrow, 2e-5);
  compare<float>(l, make_inputs<float>(l, std::vector<int>(l.num_slots, 1)), kDecode, 2e-5);
}

TEST_F(GatedDeltaKernels, SixteenBitInputs) {
  // The error is the rounding of the output; the states must stay as near as with float32 inputs.
  Layer l = kEmulated ? make_layer(1, 2, 2) : make_layer(2, 4, 2);
  compare<__nv_bfloat16>(l, make_inputs<__nv_bfloat16>(l, {70, 33}), kAnyTile, 4e-3);
  compare<__nv_bfloat16>(l, make_inputs<__nv_bfloat16>(l, {1, 1}), kDecode, 4e-3);
  compare<__half>(l, make_inputs<__half>(l, {33, 2}), kAnyTile, 5e-4);
  compare<__half>(l, make_inputs<__half>(l, {1, 1}), kDecode, 5e-4);
}

TEST_F(GatedDeltaKernels, ForgettingTokensKeepWhatFollows) {
  Layer l = make_layer(1, 1, 1);
  l.decay_rate = {1};
  l.dt_bias = {0};
  Inputs in = make_inputs<float>(l, {64});
  for (int t = 0; t < 64; ++t) in.rows[t * in.stride + l.channels() + kDeltaDim + 1] = t < 32 ? 90 : -3;
  compare<float>(l, in, kAnyTile, 1e-5);
}

TEST_F(GatedDeltaKernels, EqualKeysStayStable) {
  Layer l = make_layer(1, 2, 1);
  l.decay_rate = {1e-5f, 1e-5f};
  const int length = kEmulated ? 66 : 150;
  Inputs in = make_inputs<float>(l, {length});
  for (int t = 1; t < length; ++t)
    std::copy(in.rows.begin(), in.rows.begin() + in.stride, in.rows.begin() + t * in.stride);
  compare<float>(l, in, kAnyTile, 2e-4, 2e-4);
}

#if !defined(SPOT_EMULATED)
TEST_F(GatedDeltaKernels, DecodeReplaysFromAGraph) {
  Layer l = make_layer(2, 4, 4);
  Inputs in = make_inputs<__nv_bfloat16>(l, {1, 1, 1});
  Device<__nv_bfloat16> device(l, in);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamCreate(&stream));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  check(gated_delta_decode(device.params, stream));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  for (int step = 0; step < 4; ++step) {
    in = make_inputs<__nv_bfloat16>(l, {1, 1, 1});  // other tokens and other slots
    device.rows.upload(device.as_stored(in.rows));
    device.slots.upload(in.slots);
    const std::vector<double> wanted = expect(l, in);
    check(cudaGraphLaunch(executable, stream));
    check(cudaStreamSynchronize(stream));
    expect_close(doubles(device.output), wanted, 4e-3, "output");
  }
  expect_close(doubles(device.recurrent_states), l.expected_recurrent, 2e-5, "recurrent states");
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}
#endif

TEST_F(GatedDeltaKernels, RefusesWhatItDoesNotTake) {
  Layer l = make_layer(2, 4, 2);
  const Inputs in = make_inputs<float>(l, {1, 1});
  Device<float> device(l, in);
  GatedDeltaParams p = device.params;
  p.num_key_heads = 3;
  EXPECT_EQ(gated_delta_decode(p, nullptr), cudaErrorInvalidValue);
  p = device.params;
  p.mixed_qkv_stride += 1;
  EXPECT_EQ(gated_delta_decode(p, nullptr), cudaErrorInvalidValue);
  p = device.params;
  p.num_tokens = 1;
  EXPECT_EQ(gated_delta_decode(p, nullptr), cudaErrorInvalidValue);
  p = device.params;
  p.scan_columns = 24;
  EXPECT_EQ(gated_delta_prefill(p, nullptr), cudaErrorInvalidValue);
  p = device.params;
  p.chunk_sequences = nullptr;
  EXPECT_EQ(gated_delta_prefill(p, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace spot::kernels
