#include "distill/divergence.h"

#include <limits>

namespace spot {
namespace {

// The k largest of each row of scores [.., entries], ties to the lower index; -inf entries are never members.
at::Tensor top_members(const at::Tensor& scores, int64_t k) {
  const int64_t entries = scores.size(-1);
  const at::Tensor valid = scores > -kInfinity;
  if (k >= entries) return valid;
  const at::Tensor threshold = std::get<0>(at::kthvalue(scores, entries - k + 1, -1, true));
  at::Tensor members = scores > threshold;
  const at::Tensor ties = (scores == threshold).logical_and_(valid);
  const at::Tensor wanted = k - members.sum(-1, true, at::kInt);
  return members.logical_or_(ties.logical_and(at::cumsum(ties, -1, at::kInt) <= wanted));
}

}  // namespace

at::Tensor divergence(const at::Tensor& scores, const at::Tensor& mass, int64_t k, bool rest_bucket,
                      at::Tensor& loss) {
  const double tiny = smallest_mass(mass.scalar_type());
  const bool restricted = k < scores.size(-1);
  const at::Tensor members = restricted ? top_members(scores, k) : scores > -kInfinity;
  const at::Tensor others = members.logical_not();

  if (restricted && rest_bucket) {
    const at::Tensor rest_scores = scores.masked_fill(members, -kInfinity);
    const at::Tensor rest_log_sum = at::logsumexp(rest_scores, {-1}, true);  // -inf where S is all of A
    const at::Tensor student_log = at::log_softmax(scores, -1);
    const at::Tensor total = mass.sum(-1, true).clamp_min_(tiny);
    const at::Tensor teacher = mass / total;
    const at::Tensor inside = teacher.masked_fill(others, 0.0);
    const at::Tensor outside = teacher.masked_fill(members, 0.0).sum(-1, true);
    const at::Tensor rest_log = rest_log_sum - at::logsumexp(scores, {-1}, true);
    loss +=
        (at::xlogy(inside, inside) - inside * student_log.masked_fill(others, 0.0)).sum(at::kDouble) +
        (at::xlogy(outside, outside) - outside * rest_log.masked_fill(outside == 0.0, 0.0)).sum(at::kDouble);
    // Outside S the target is the bucket's teacher mass, spread as the student spreads its own.
    const at::Tensor spread =
        at::exp(rest_scores - rest_log_sum.masked_fill(rest_log_sum == -kInfinity, 0.0)).mul_(outside);
    const at::Tensor has_mass = (inside.sum(-1, true) + outside) > 0.0;
    return student_log.exp_().mul_(has_mass).sub_(inside).sub_(spread);
  }

  at::Tensor student_log = at::log_softmax(restricted ? scores.masked_fill(others, -kInfinity) : scores, -1);
  at::Tensor teacher = restricted ? mass.masked_fill(others, 0.0) : mass;
  const at::Tensor total = teacher.sum(-1, true);
  teacher = teacher / total.clamp_min(tiny);
  loss += (at::xlogy(teacher, teacher) - teacher * student_log.masked_fill(others, 0.0)).sum(at::kDouble);
  // A row whose teacher mass underflows to nothing says nothing: no loss, no gradient.
  return student_log.exp_().mul_(total > 0.0).sub_(teacher);
}

}  // namespace spot
