// Times the forms of narrow_linear on the GPU it runs on: microseconds, terabytes of W a second, and their share of what
// a plain reading kernel gets in the same run. Checks every form against float64 and, bit for bit, against each other.
//
//   linear_kernels [--rows 1,4,8,16] [--no-ring]
//
// Each figure is the least of replays of a CUDA graph of launches that overlap as an operator's do, over more than 1 GB of
// matrices in turn. The kernels' source is compiled in, so that forms can be asked for. No torch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "bench/narrow_linear_old.cuh"
#include "kernels/narrow_linear.cu"

namespace spot::kernels {
namespace {

constexpr size_t kPoolBytes = size_t{5} << 28;  // 1.25 GiB
constexpr int kMostRows = 16, kMostWidth = 12288, kMostOut = 24576;

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "bench/linear_kernels.cu:%d: %s\n", line, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check(call, __LINE__)

template <typename T>
T* allocate(size_t count) {
  void* p = nullptr;
  CHECK(cudaMalloc(&p, count * sizeof(T)));
  return static_cast<T*>(p);
}

__host__ __device__ uint64_t mixed(uint64_t i) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}
__global__ void fill_bf16(__nv_bfloat16* to, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint64_t x = mixed(i + seed);
    float sum = 0;
    for (int j = 0; j < 4; ++j) sum += static_cast<float>(x >> (16 * j) & 0xffff) * (1.0f / 65536.0f) - 0.5f;
    to[i] = __float2bfloat16_rn(sum);
  }
}
__global__ void fill_codes(uint8_t* to, size_t count, uint64_t seed) {  // every number that there is
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    auto code = static_cast<uint8_t>(mixed(i + seed) >> 32);
    if ((code & 0x7f) == 0x7f) code ^= 1;
    to[i] = code;
  }
}
__global__ void fill_scales(float* to, int count) {
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < count;
       i += static_cast<int>(gridDim.x * blockDim.x))
    to[i] = exp2f(static_cast<float>(mixed(i) % 64) / 16 - 14);
}

template <int kAhead>
__global__ void __launch_bounds__(512) read_kernel(const uint8_t* from, size_t bytes, uint32_t* to) {
  uint32_t sum = 0;
  const size_t stride = size_t{gridDim.x} * blockDim.x * 16;
  size_t at = (blockIdx.x * size_t{blockDim.x} + threadIdx.x) * 16;
  for (; at + (kAhead - 1) * stride < bytes; at += kAhead * stride) {
    uint4 v[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) v[i] = ptx::load_streaming(from + at + i * stride);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum ^= v[i].x ^ v[i].y ^ v[i].z ^ v[i].w;
  }
  if (sum == 0x12345677) *to = sum;
}

cudaStream_t stream;
bool with_ring = true;

// Least microseconds of a graph of what `run` launches.
double time_us(const std::function<void()>& run, int replays = 12) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  run();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float least = 1e30f;
  for (int i = 0; i < replays; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(exec, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) least = std::min(least, ms);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaGraphExecDestroy(exec));
  CHECK(cudaGraphDestroy(graph));
  return static_cast<double>(least) * 1000;
}

enum Form { kOld, kPortable, kRingHalf, kRingAll, kRingTwo, kRingBare, kForms };
const char* const kNames[kForms] = {"before", "portable", "ring 1/2", "ring 1/1", "ring x2", "copies alone"};

template <bool kCodes, int kColumns>
cudaError_t start_form(Form form, const NarrowLinearParams& p) {
  using T = __nv_bfloat16;
  if (form > kPortable && !with_ring) return cudaErrorNotSupported;
  if (form == kPortable) return start_portable<T, kCodes, kColumns>(p, stream);
  RingShape ring;
  uint32_t bytes;
  if (!ring_fits<T, kCodes, kColumns>(p, form == kRingAll ? kAllOfShared : kHalfOfShared, &ring, &bytes))
    return cudaErrorNotSupported;
  if (form == kRingBare) return start_ring<T, kCodes, kColumns, true>(p, ring, bytes, stream);
  return start_ring<T, kCodes, kColumns>(p, ring, bytes, stream, form == kRingTwo ? 2 : 1);
}
// cudaErrorNotSupported: does not fit.
cudaError_t run_form(Form form, const NarrowLinearParams& p) {
  if (form == kOld) return old::narrow_linear(p, stream);
  if (p.num_rows <= 8) return p.e4m3 ? start_form<true, 1>(form, p) : start_form<false, 1>(form, p);
  return p.e4m3 ? start_form<true, 2>(form, p) : start_form<false, 2>(form, p);
}

struct Shape {
  const char* name;
  int32_t out, width;
};
const Shape kShapes[] = {
    {"qkv", 6144, 4096}, {"out", 4096, 4096}, {"gate_up", 24576, 4096}, {"down", 4096, 12288}};

struct Data {
  uint8_t* codes;
  __nv_bfloat16 *wide, *x, *y;
  float* scales;
};

NarrowLinearParams parameters(const Data& d, const Shape& shape, bool e4m3, int rows, size_t offset) {
  NarrowLinearParams p;
  p.e4m3 = e4m3;
  p.num_rows = rows, p.width = shape.width, p.out = shape.out;
  p.x = d.x, p.x_stride = kMostWidth;
  p.weight = (e4m3 ? d.codes : reinterpret_cast<const uint8_t*>(d.wide)) + offset;
  p.scales = e4m3 ? d.scales : nullptr;
  p.y = d.y, p.y_stride = kMostOut;
  p.overlap = Overlap::kHistory;
  return p;
}

double code_number(uint8_t code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  const double size = exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
  return code & 0x80 ? -size : size;
}
double number(__nv_bfloat16 x) {
  return static_cast<double>(__bfloat162float(x));
}

int failures = 0;

// y of every form and row count against float64 in some columns of y, and bit for bit against each other.
void verify(const Data& d, const Shape& shape, bool e4m3) {
  const size_t count = size_t{kMostRows} * kMostOut;
  std::vector<__nv_bfloat16> x(kMostRows * kMostWidth), y(count), first;
  CHECK(cudaMemcpy(x.data(), d.x, x.size() * 2, cudaMemcpyDeviceToHost));
  const int across = (shape.width + kScaleBlock - 1) / kScaleBlock;
  std::vector<float> scales(static_cast<size_t>(across) * ((shape.out + kScaleBlock - 1) / kScaleBlock));
  CHECK(cudaMemcpy(scales.data(), d.scales, scales.size() * 4, cudaMemcpyDeviceToHost));
  for (const Form form : {kPortable, kRingHalf, kRingAll, kRingTwo, kOld})
    for (const int rows : {16, 1, 8, 5}) {
      const NarrowLinearParams p = parameters(d, shape, e4m3, rows, 0);
      CHECK(cudaMemset(d.y, 0xff, count * 2));
      const cudaError_t error = run_form(form, p);
      if (error == cudaErrorNotSupported) continue;
      CHECK(error);
      CHECK(cudaStreamSynchronize(stream));
      CHECK(cudaMemcpy(y.data(), d.y, count * 2, cudaMemcpyDeviceToHost));
      double worst = 0;
      for (int i = 0; i < 40 && (rows == 16 || rows == 1); ++i) {
        const int column = static_cast<int>(mixed(i * 31 + rows) % static_cast<uint64_t>(shape.out));
        std::vector<double> w(shape.width);
        std::vector<uint8_t> raw(shape.width * (e4m3 ? 1 : 2));
        CHECK(cudaMemcpy(raw.data(), static_cast<const uint8_t*>(p.weight) + column * raw.size(), raw.size(),
                         cudaMemcpyDeviceToHost));
        for (int k = 0; k < shape.width; ++k) {
          __nv_bfloat16 value;
          std::memcpy(&value, &raw[e4m3 ? 0 : 2 * k], 2);
          w[k] = e4m3 ? code_number(raw[k]) *
                            static_cast<double>(scales[column / kScaleBlock * across + k / kScaleBlock])
                      : number(value);
        }
        for (int row = 0; row < rows; ++row) {
          double sum = 0, size = 0;
          for (int k = 0; k < shape.width; ++k) {
            const double product = number(x[row * kMostWidth + k]) * w[k];
            sum += product, size += std::abs(product);
          }
          const double off =
              std::abs(number(y[row * kMostOut + column]) - sum) / (std::abs(sum) / 256 + 3e-6 * size);
          worst = off <= worst ? worst : off;  // NaN counts
        }
      }
      if (form == kPortable && rows == 16) first = y;
      bool equal = true;
      for (int row = 0; row < rows && form != kOld; ++row)
        equal = equal && std::memcmp(&y[row * kMostOut], &first[row * kMostOut], shape.out * 2) == 0;
      if (!(worst <= 1) || !equal) {
        ++failures;
        std::printf("WRONG: %s %s %s, %d rows: error %.2f of what is allowed, %s\n", shape.name,
                    e4m3 ? "fp8" : "bf16", kNames[form], rows, worst,
                    equal ? "equal" : "NOT EQUAL to the portable form");
      }
    }
}

// A NaN code makes its row of W NaN, and no other.
void verify_nan(const Data& d) {
  const Shape shape = kShapes[1];
  const size_t place = size_t{1234} * shape.width + 777;
  uint8_t before;
  CHECK(cudaMemcpy(&before, d.codes + place, 1, cudaMemcpyDeviceToHost));
  CHECK(cudaMemset(d.codes + place, 0xff, 1));
  for (const Form form : {kPortable, kRingHalf, kRingAll}) {
    const cudaError_t error = run_form(form, parameters(d, shape, true, 8, 0));
    if (error == cudaErrorNotSupported) continue;
    CHECK(error);
    CHECK(cudaStreamSynchronize(stream));
    std::vector<__nv_bfloat16> y(8 * kMostOut);
    CHECK(cudaMemcpy(y.data(), d.y, y.size() * 2, cudaMemcpyDeviceToHost));
    int wrong = 0;
    for (int row = 0; row < 8; ++row)
      for (int column = 0; column < shape.out; ++column)
        wrong += std::isnan(number(y[row * kMostOut + column])) != (column == 1234);
    if (wrong != 0) ++failures, std::printf("WRONG: NaN, %s: %d numbers\n", kNames[form], wrong);
  }
  CHECK(cudaMemcpy(d.codes + place, &before, 1, cudaMemcpyHostToDevice));
}

int run_all(int argc, char** argv) {
  std::vector<int> rows_of = {1, 4, 8, 16};
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--no-ring") with_ring = false;
    if (std::string(argv[i]) != "--rows" || ++i >= argc) continue;
    rows_of.clear();
    for (char* word = std::strtok(argv[i], ","); word != nullptr; word = std::strtok(nullptr, ","))
      rows_of.push_back(std::atoi(word));
  }
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  Data d;
  d.codes = allocate<uint8_t>(kPoolBytes);
  d.wide = allocate<__nv_bfloat16>(kPoolBytes / 2);
  d.x = allocate<__nv_bfloat16>(kMostRows * kMostWidth);
  d.y = allocate<__nv_bfloat16>(kMostRows * kMostOut);
  d.scales = allocate<float>(192 * 96);
  fill_codes<<<2048, 256>>>(d.codes, kPoolBytes, 1);
  fill_bf16<<<2048, 256>>>(d.wide, kPoolBytes / 2, 2);
  fill_bf16<<<256, 256>>>(d.x, kMostRows * kMostWidth, 3);
  fill_scales<<<64, 256>>>(d.scales, 192 * 96);
  CHECK(cudaDeviceSynchronize());

  for (const Shape& shape : kShapes)
    for (const bool e4m3 : {true, false}) verify(d, shape, e4m3);
  verify_nan(d);
  std::printf("checked: %d wrong\n", failures);

  double peak = 0;
  const auto read = [&](auto kernel, int ahead) {
    for (const int blocks :
         {device.multiProcessorCount, 2 * device.multiProcessorCount, 4 * device.multiProcessorCount}) {
      const size_t turn = static_cast<size_t>(blocks) * 512 * 16 * ahead, bytes = kPoolBytes / turn * turn;
      const double us = time_us(
          [&] { kernel<<<blocks, 512, 0, stream>>>(d.codes, bytes, reinterpret_cast<uint32_t*>(d.y)); });
      peak = std::max(peak, static_cast<double>(bytes) / us * 1e-6);
    }
  };
  read(read_kernel<4>, 4), read(read_kernel<8>, 8), read(read_kernel<16>, 16);
  std::printf("%s, %d multiprocessors; a plain kernel reads %.3f TB/s\n", device.name,
              device.multiProcessorCount, peak);

  for (const bool e4m3 : {true, false})
    for (const int rows : rows_of) {
      std::printf("\n%s, %d rows: us (TB/s, share)\n%-8s", e4m3 ? "fp8" : "bf16", rows, "");
      for (int form = 0; form < kForms; ++form) std::printf(" %22s", kNames[form]);
      std::printf("\n");
      double sums[kForms] = {}, sum_bytes = 0;
      const auto cell = [&](double us, double bytes) {
        const double rate = bytes / us * 1e-6;
        std::printf("  %8.2f (%.2f, %3.0f%%)  ", us, rate, 100 * rate / peak);
      };
      for (const Shape& shape : kShapes) {
        const size_t bytes = size_t{1} * shape.out * shape.width * (e4m3 ? 1 : 2);
        const int copies = static_cast<int>(kPoolBytes / bytes);
        std::printf("%-8s", shape.name);
        sum_bytes += static_cast<double>(bytes);
        for (int form = 0; form < kForms; ++form) {
          if (run_form(static_cast<Form>(form), parameters(d, shape, e4m3, rows, 0)) != cudaSuccess) {
            std::printf(" %22s", "-");
            sums[form] = NAN;
            continue;
          }
          const double us =
              time_us([&] {
                for (int i = 0; i < copies; ++i)
                  CHECK(run_form(static_cast<Form>(form), parameters(d, shape, e4m3, rows, i * bytes)));
              }) /
              copies;
          sums[form] += us;
          cell(us, static_cast<double>(bytes));
        }
        std::printf("\n");
      }
      std::printf("%-8s", "sum");
      for (int form = 0; form < kForms; ++form) cell(sums[form], sum_bytes);
      // The four after each other, as in a layer.
      std::printf("\n%-8s", "layer");
      const int layers = static_cast<int>(static_cast<double>(kPoolBytes) / sum_bytes);
      for (int form = 0; form < kForms; ++form) {
        if (std::isnan(sums[form])) {
          std::printf(" %22s", "-");
          continue;
        }
        const double us =
            time_us([&] {
              size_t at = 0;
              for (int i = 0; i < layers; ++i)
                for (const Shape& shape : kShapes) {
                  CHECK(run_form(static_cast<Form>(form), parameters(d, shape, e4m3, rows, at)));
                  at += size_t{1} * shape.out * shape.width * (e4m3 ? 1 : 2);
                }
            }) /
            layers;
        cell(us, sum_bytes);
      }
      std::printf("\n");
      std::fflush(stdout);
    }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace spot::kernels

int main(int argc, char** argv) {
  return spot::kernels::run_all(argc, argv);
}
