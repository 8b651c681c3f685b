// Tensors to the pointers of the distillation kernels, on the current stream; what they do not take goes to the ATen
// form. Nothing waits for the device.
#include "kernels/selector_kl.h"
#include "kernels/teacher_mass.h"
#include "ops/cuda/call.h"
#include "ops/distill/distill.h"

namespace spot::ops {

namespace aten {
decltype(ops::teacher_mass) teacher_mass;
decltype(ops::selector_kl) selector_kl;
}  // namespace aten

namespace cuda {
namespace {

kernels::QueryStrip strip_of(const QueryStrip& s, int64_t width, const at::Tensor& query) {
  return {s.tokens.const_data_ptr<int32_t>(),
          s.low.const_data_ptr<int32_t>(),
          s.last.const_data_ptr<int32_t>(),
          narrow(s.tokens.size(0)),
          narrow(s.first_key),
          narrow(width),
          narrow(query.size(0))};
}

// Rows in memory are whole 16-byte pieces.
int64_t padded(int64_t width) {
  return (width + 7) / 8 * 8;
}

}  // namespace

TeacherMass::Result teacher_mass(const TeacherMass& a) {
  const auto& [query, key, logsumexp, strip, scale, groups] = a;
  if (!fuses_mass(query, key)) return aten::teacher_mass(a);
  const c10::DeviceGuard guard(query.device());
  const at::Tensor sums = logsumexp.to(at::kFloat).contiguous();
  const int64_t width = padded(strip.width);
  const at::Tensor mass = at::empty({strip.tokens.size(0), groups, width}, query.options().dtype(at::kFloat));
  const int64_t chunk = kernels::mass_chunk(narrow(query.size(2)));
  const at::Tensor chunk_sums =
      at::empty({mass.size(0), groups, (width + chunk - 1) / chunk}, mass.options());
  kernels::TeacherMassParams p;
  p.data_type = data_type(query);
  p.strip = strip_of(strip, width, query);
  p.num_heads = narrow(query.size(1));
  p.num_kv_heads = narrow(key.size(1));
  p.head_dim = narrow(query.size(2));
  p.groups = narrow(groups);
  p.scale = static_cast<float>(scale);
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.query_token_stride = query.stride(0);
  p.query_head_stride = query.stride(1);
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.logsumexp = sums.const_data_ptr<float>();
  p.logsumexp_head_stride = sums.stride(0);
  p.mass = mass.mutable_data_ptr<float>();
  p.chunk_sums = chunk_sums.mutable_data_ptr<float>();
  check(kernels::teacher_mass(p, native_stream(query)), "spot::teacher_mass");
  return {mass.narrow(2, 0, strip.width).contiguous(), chunk_sums.sum(-1)};
}

SelectorKl::Result selector_kl(const SelectorKl& a) {
  const auto& [mass, total, query, key, weight, strip, k_train, grad_key] = a;
  if (!fuses_kl(query, key) || mass.scalar_type() != at::kFloat) return aten::selector_kl(a);
  const c10::DeviceGuard guard(query.device());
  const int64_t rows = mass.size(0), width = padded(mass.size(1)), heads = query.size(1), dim = query.size(2);
  const int64_t chunks = (width + kernels::kKlChunk - 1) / kernels::kKlChunk;
  at::Tensor teacher = width == mass.size(1) ? mass : at::constant_pad_nd(mass, {0, width - mass.size(1)});
  const at::Tensor weights = weight.contiguous();
  const at::Tensor partial = at::empty({rows, chunks}, mass.options());
  const at::Tensor sums = at::empty({rows, chunks, kernels::kKlSums}, mass.options());
  const bool shared = key.size(1) == 1, gradients = grad_key.defined();
  // With a shared key the heads are rows of one product; with a key per head they are a batch.
  at::Tensor dots_grad;
  if (gradients)
    dots_grad = at::empty(shared ? at::IntArrayRef{rows, heads, width} : at::IntArrayRef{heads, rows, width},
                          query.options());
  kernels::SelectorKlParams p;
  p.strip = strip_of(strip, width, query);
  p.key_heads = narrow(key.size(1));
  p.query = query.const_data_ptr();
  p.key = key.const_data_ptr();
  p.weight = weights.const_data_ptr<float>();
  p.query_token_stride = query.stride(0);
  p.query_head_stride = query.stride(1);
  p.key_token_stride = key.stride(0);
  p.key_head_stride = key.stride(1);
  p.mass = teacher.mutable_data_ptr<float>();
  p.total = total.const_data_ptr<float>();
  at::Tensor scores, entropy;
  if (k_train > 0) {
    scores = at::empty({rows, width}, mass.options());
    entropy = at::empty({rows}, mass.options());
    p.k_train = narrow(std::min(k_train, width));
    p.scores = scores.mutable_data_ptr<float>();
    p.entropy = entropy.mutable_data_ptr<float>();
  }
  p.chunk_logsumexp = partial.mutable_data_ptr<float>();
  p.sums = sums.mutable_data_ptr<float>();
  if (gradients) {
    p.dots_grad = dots_grad.mutable_data_ptr();
    p.dots_grad_row_stride = dots_grad.stride(shared ? 0 : 1);
    p.dots_grad_head_stride = dots_grad.stride(shared ? 1 : 0);
  }
  check(kernels::selector_kl(p, native_stream(query)), "spot::selector_kl");
  const at::Tensor whole = sums.sum(1);  // [rows, kKlSums]
  SelectorKl::Result out{
      whole.select(1, 0).contiguous(), k_train > 0 ? entropy : whole.select(1, 1).neg(), {}, {}};
  if (!gradients) {
    out.grad_query = out.grad_weight = at::empty({0}, mass.options());
    return out;
  }
  out.grad_weight = whole.narrow(1, 4, heads).contiguous();
  const int64_t real = std::min(width, key.size(0) - strip.first_key);
  const at::Tensor q = query.index_select(0, strip.tokens), k = key.narrow(0, strip.first_key, real);
  at::Tensor key_grad = grad_key.narrow(1, strip.first_key, real);
  if (shared) {
    const at::Tensor flat = dots_grad.view({rows * heads, width}).narrow(1, 0, real);
    out.grad_query = at::mm(flat, k.select(1, 0), at::kFloat).view({rows, heads, dim});
    key_grad.select(0, 0).add_(at::mm(flat.t(), q.view({rows * heads, dim}), at::kFloat));
  } else {
    const at::Tensor batch = dots_grad.narrow(2, 0, real);
    out.grad_query = at::bmm(batch, k.transpose(0, 1), at::kFloat).transpose(0, 1).contiguous();
    key_grad.add_(at::bmm(batch.transpose(1, 2), q.transpose(0, 1), at::kFloat));
  }
  return out;
}

}  // namespace cuda
}  // namespace spot::ops
