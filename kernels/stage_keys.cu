// Contract: score_tiles.h. Floor: key_bytes(format) read and 256 written a token and key head: 43 MB for shared INT4
// at 131,072 tokens, 10 us at 4.3 TB/s. Grid: [pages of the longest sequence, sequences * key_heads], a thread a
// (token, 8 dims).
#include <cuda_bf16.h>

#include "kernels/launch.h"
#include "kernels/ptx.cuh"
#include "kernels/score_tiles.h"

namespace spot::kernels {
namespace {

constexpr int kPieces = kKeyDim / 8, kStageThreads = kPageTokens * kPieces;

template <KeyFormat kFormat>
__global__ void __launch_bounds__(kStageThreads) stage_keys_kernel(const StageKeysParams p) {
  const int sequence = static_cast<int>(blockIdx.y) / p.key_heads,
            head = static_cast<int>(blockIdx.y) % p.key_heads;
  const int block = static_cast<int>(blockIdx.x), token = static_cast<int>(threadIdx.x) / kPieces,
            piece = static_cast<int>(threadIdx.x) % kPieces;
  const int64_t position = static_cast<int64_t>(block) * kPageTokens + token;
  if (position >= p.lengths[sequence]) return;
  const uint8_t* page =
      p.pages +
      (p.page_table[sequence * p.page_table_stride + block] * static_cast<int64_t>(p.key_heads) + head) *
          page_head_bytes(kFormat);
  const float scale = decode_scale(kFormat, load_scale(kFormat, page, token, 8 * piece / group_size(kFormat)),
                                   p.global_scale);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x[2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
      x[j] = mul_rn(decode_value(kFormat, load_code(kFormat, page, token, 8 * piece + 2 * i + j)), scale);
    words[i] = float_to_bf16(x[0]) | float_to_bf16(x[1]) << 16;
  }
  uint16_t* const to = static_cast<uint16_t*>(p.keys) +
                       (head * p.key_tokens + p.key_begins[sequence] + position) * kKeyDim + 8 * piece;
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

template <KeyFormat kFormat>
cudaError_t start(const StageKeysParams& p, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((p.longest + kPageTokens - 1) / kPageTokens),
                    static_cast<unsigned>(p.sequences * p.key_heads));
  shape.block = dim3(kStageThreads);
  return launch(stage_keys_kernel<kFormat>, shape, stream, p);
}

}  // namespace

cudaError_t stage_keys(const StageKeysParams& p, cudaStream_t stream) {
  if ((p.key_heads != 1 && p.key_heads != kSelectorHeads) || p.sequences < 0 || p.longest < 0)
    return cudaErrorInvalidValue;
  if (p.sequences == 0 || p.longest == 0) return cudaSuccess;
  if (p.pages == nullptr || reinterpret_cast<uintptr_t>(p.pages) % 16 != 0 || p.page_table == nullptr ||
      p.lengths == nullptr || p.key_begins == nullptr || p.keys == nullptr ||
      reinterpret_cast<uintptr_t>(p.keys) % 16 != 0)
    return cudaErrorInvalidValue;
  switch (p.format) {
    case KeyFormat::bf16:
      return start<KeyFormat::bf16>(p, stream);
    case KeyFormat::int8:
      return start<KeyFormat::int8>(p, stream);
    case KeyFormat::int4:
      return start<KeyFormat::int4>(p, stream);
    case KeyFormat::mxfp4:
      return start<KeyFormat::mxfp4>(p, stream);
    case KeyFormat::nvfp4:
      return start<KeyFormat::nvfp4>(p, stream);
    case KeyFormat::f32:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace spot::kernels
