// What Quest and Twilight keep of the keys: bounds of every page, and a 4-bit copy of every key.
#pragma once

#include "kernels/types.h"

namespace spot::kernels {

// Launched after keys were written to their pool at `slots`, which hold each sequence's new tokens in order.
struct KeySummaryAppendParams {
  DataType type = DataType::kBf16;  // of keys and bounds: kBf16 or kF16
  int64_t num_tokens = 0;           // T
  int32_t num_kv_heads = 0;
  int32_t head_dim = 128;  // 64, 128 or 256
  // Pool; element strides from page to page, head to head and token to token, multiples of 8, 16-byte
  // aligned.
  const void* keys = nullptr;
  int64_t page_stride = 0, head_stride = 0, token_stride = 0;
  const int64_t* slots = nullptr;  // [T] = page * 16 + offset; a negative slot skips its token
  int64_t num_pages = 0;
  // [Hkv, num_pages, 2, head_dim]: elementwise minimum and maximum of a page's keys, taken anew from the
  // tokens up to the last new one, so that a page that changed hands keeps nothing of its former owner.
  void* bounds = nullptr;
  // [Hkv, num_pages * 16, head_dim / 2] and [Hkv, num_pages * 16, 2] float16, or both null. Two codes 0..15 a
  // byte, the even dim in the low half; then scale = (max - min) / 15 and min over the key's dims. Codes are
  // taken against the rounded scale and min; a scale of 0 gives code 0. Bytes: head_dim / 2 + 4 a key and
  // head.
  uint8_t* codes = nullptr;
  void* ranges = nullptr;
  Overlap overlap = Overlap::kNone;
};

cudaError_t key_summary_append(const KeySummaryAppendParams& params, cudaStream_t stream);

}  // namespace spot::kernels
