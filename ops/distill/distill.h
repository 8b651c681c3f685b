// The two halves of the distillation loss over a strip of queries. The ATen form serves every device and dtype and is
// the oracle of the CUDA kernels (kernels/teacher_mass.h, kernels/selector_kl.h), which serve what fuses_mass and
// fuses_kl say.
#pragma once

#include <ATen/ATen.h>

#include "ops/op.h"

namespace spot::ops {

// A strip: query row r is token tokens[r] and sees the keys of tokens low[r] .. last[r], its document up to itself or
// a part of that. Maps have a column for each of the `width` tokens from first_key on, which must hold all that is
// seen.
struct QueryStrip {
  at::Tensor tokens, low, last;  // [R] int32 on the inputs' device, all ascending
  int64_t first_key = 0, width = 0;

  template <auto... kAt>
  static constexpr auto fields() {
    using S = QueryStrip;
    return std::tuple(required<kAt..., &S::tokens>("tokens"), required<kAt..., &S::low>("low"),
                      required<kAt..., &S::last>("last"), required<kAt..., &S::first_key>("first_key"));
  }
};

// Probabilities averaged over the heads of each of `groups` groups of consecutive query heads.
struct TeacherMass {
  static constexpr const char* kName = "teacher_mass";
  struct Result {
    static constexpr std::array<const char*, 2> kNames = {"mass", "total"};
    at::Tensor mass;   // [R, groups, width] float32 (float64 for float64 queries), 0 where a row does not see
    at::Tensor total;  // [R, groups], the rows' sums: 1 up to rounding where a row sees all, else less
  };
  at::Tensor query;  // [T, num_heads, head_dim]
  at::Tensor key;    // [T, num_kv_heads, head_dim]
  // [num_heads, T] float32 or float64, the natural logarithm of each query's sum of e^(scale q . k), over its
  // document up to itself whatever of that its row sees.
  at::Tensor logsumexp;
  QueryStrip strip;
  double scale = 0.0;
  int64_t groups = 1;

  static constexpr auto fields() {
    using S = TeacherMass;
    return std::tuple_cat(std::tuple(required<&S::query>("query"), required<&S::key>("key"),
                                     required<&S::logsumexp>("logsumexp")),
                          QueryStrip::fields<&S::strip>(),
                          std::tuple(required<&S::strip, &QueryStrip::width>("width"),
                                     required<&S::scale>("scale"), optional<&S::groups>("groups")));
  }
  void check() const;
};
TeacherMass::Result teacher_mass(const TeacherMass& arguments);
bool fuses_mass(const at::Tensor& query, const at::Tensor& key);

// KL(teacher || student) of each row, where teacher is mass over its sum on the keys the row sees, and student the
// softmax of sum_h weight[h] ReLU(query[h] . key[h]) over them; and the gradients of the rows' sum. With k_train > 0
// both are renormalised on the k_train keys of highest score (ties to the lower), fewer where a row sees fewer. A row
// without mass (less than 1e-37; 1e-300 in float64) has no loss and no gradient. On CUDA the scores' gradients are
// rounded to bfloat16 once, before the products that make the other two of them.
struct SelectorKl {
  static constexpr const char* kName = "selector_kl";
  struct Result {
    static constexpr std::array<const char*, 4> kNames = {"loss", "entropy", "grad_query", "grad_weight"};
    at::Tensor loss, entropy;  // [R]; entropy is that of the teacher on all keys, in nats
    at::Tensor grad_query;     // [R, heads, dim]; empty without grad_key, as is grad_weight
    at::Tensor grad_weight;    // [R, heads]
  };
  at::Tensor mass,
      total;         // [R, width] and [R] as from teacher_mass with one group; k_train > 0 may overwrite mass
  at::Tensor query;  // [T, heads, dim]
  at::Tensor key;    // [T, heads or 1, dim]
  at::Tensor weight;  // [T, heads] of mass's dtype
  QueryStrip strip;   // its width is mass's
  int64_t k_train = 0;
  at::Tensor grad_key = {};  // [heads or 1, T, dim] of mass's dtype: the gradient of keys is added to it

  static constexpr auto fields() {
    using S = SelectorKl;
    return std::tuple_cat(
        std::tuple(updated<&S::mass>("mass"), required<&S::total>("total"), required<&S::query>("query"),
                   required<&S::key>("key"), required<&S::weight>("weight")),
        QueryStrip::fields<&S::strip>(),
        std::tuple(optional<&S::k_train>("k_train"), optional_updated<&S::grad_key>("grad_key")));
  }
  void check() const;
};
SelectorKl::Result selector_kl(const SelectorKl& arguments);
bool fuses_kl(const at::Tensor& query, const at::Tensor& key);

}  // namespace spot::ops
