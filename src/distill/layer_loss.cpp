#include "distill/layer_loss.h"

#include <ATen/core/grad_mode.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "core/error.h"

namespace spot {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A query: its position in the document and the half-open range of its active tokens.
struct Row {
  int64_t position, low, high;
};

Row make_row(int64_t position, const LayerLossOptions& o) {
  if (o.scope == TeacherScope::all) return {position, 0, position + 1};
  const int64_t low = (o.sinks + o.block_size - 1) / o.block_size * o.block_size;
  const int64_t high = std::max<int64_t>(0, position + 1 - o.recency) / o.block_size * o.block_size;
  return {position, low, high};
}

void check(const LayerLossInputs& in, const LayerLossOptions& o) {
  auto shape = [](const at::Tensor& t) { return fmt::format("[{}]", fmt::join(t.sizes(), ", ")); };
  auto want = [&](const at::Tensor& t, const char* name) {
    if (!t.defined() || t.dim() != 3) fail("layer_loss: {} must have three dimensions", name);
    if (t.size(0) != in.query.size(0))
      fail("layer_loss: {} {} has another number of tokens than query {}", name, shape(t), shape(in.query));
    if (t.device() != in.query.device()) fail("layer_loss: {} lies on another device than query", name);
  };
  want(in.query, "query");
  want(in.key, "key");
  want(in.selector_query, "selector_query");
  want(in.selector_key, "selector_key");
  want(in.selector_weight, "selector_weight");
  if (in.query.size(2) != in.key.size(2) || in.query.size(1) % in.key.size(1) != 0)
    fail("layer_loss: query {} does not fit key {}", shape(in.query), shape(in.key));
  const int64_t heads = in.selector_query.size(1);
  if (in.selector_key.size(2) != in.selector_query.size(2) ||
      (in.selector_key.size(1) != heads && in.selector_key.size(1) != 1))
    fail("layer_loss: selector_key {} does not fit selector_query {}", shape(in.selector_key),
         shape(in.selector_query));
  if (in.selector_weight.size(2) != heads || in.key.size(1) % in.selector_weight.size(1) != 0)
    fail(
        "layer_loss: selector_weight {} needs {} heads and a number of groups that divides the {} key-value "
        "heads",
        shape(in.selector_weight), heads, in.key.size(1));
  if (o.block_size < 1 || o.sinks < 0 || o.recency < 0 || o.tile_rows < 0 || o.tile_bytes < 0)
    fail(
        "layer_loss: block_size must be positive; sinks, recency, tile_rows and tile_bytes must not be "
        "negative");
  if (o.loss == DistillLoss::sparse && o.k_train < o.block_size)
    fail("layer_loss: k_train is {}, it must be at least a block of {} tokens", o.k_train, o.block_size);
  for (double budget : o.budgets)
    if (!(budget > 0.0)) fail("layer_loss: a budget of {} is not positive", budget);
  int64_t previous = -1;
  for (int64_t start : in.document_starts) {
    if ((previous < 0 && start != 0) || start <= previous || start >= in.query.size(0))
      fail("layer_loss: document starts must ascend from 0 within {} tokens, found {} after {}",
           in.query.size(0), start, previous);
    previous = start;
  }
}

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

// KL over the entries of one tile. scores [R, G, E] with -inf outside the active set, mass [R, G, E] >= 0
// with 0 there. Adds each row's KL to `loss` and returns its derivative with respect to scores, before any
// mean.
at::Tensor divergence(const at::Tensor& scores, const at::Tensor& mass, int64_t k, bool rest_bucket,
                      at::Tensor& loss) {
  const double tiny = mass.scalar_type() == at::kDouble ? 1e-300 : 1e-37;
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

class Distiller {
 public:
  Distiller(const LayerLossInputs& in, const LayerLossOptions& options)
      : options_(options),
        in_(in),
        type_(in.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        matmul_wide_(in.query.is_cuda() && in.query.scalar_type() != at::kDouble &&
                     in.query.scalar_type() != at::kFloat),
        groups_(in.selector_weight.size(1)),
        heads_(in.selector_query.size(1)),
        query_(matmul_wide_ ? in.query : in.query.to(type_)),
        key_(matmul_wide_ ? in.key : in.key.to(type_)),
        selector_query_(in.selector_query.to(type_)),
        selector_key_(in.selector_key.to(type_)),
        weight_(in.selector_weight.to(type_)) {
    const auto sums = query_.options().dtype(at::kDouble);
    const auto count = static_cast<int64_t>(options.budgets.size());
    out_.loss = at::zeros({}, sums);
    out_.teacher_entropy = at::zeros({}, sums);
    out_.covered = at::zeros({count}, sums);
    out_.covered_oracle = at::zeros({count}, sums);
    if (options.gradients) {
      out_.grad_query = at::zeros_like(selector_query_);
      out_.grad_key = at::zeros_like(selector_key_);
      out_.grad_weight = at::zeros_like(weight_);
    }
  }

  LayerLoss run() {
    const int64_t tokens = query_.size(0);
    std::vector<int64_t> starts = in_.document_starts;
    if (starts.empty()) starts.push_back(0);
    starts.push_back(tokens);

    std::vector<int64_t> chosen = chosen_rows(tokens);
    std::vector<std::vector<Row>> rows(starts.size() - 1);
    size_t document = 0;
    for (int64_t row : chosen) {
      while (row >= starts[document + 1]) ++document;
      const Row r = make_row(row - starts[document], options_);
      if (r.high > r.low) rows[document].push_back(r);
    }
    for (const auto& document_rows : rows) out_.queries += static_cast<int64_t>(document_rows.size());
    for (size_t i = 0; i < rows.size(); ++i) run_document(starts[i], starts[i + 1] - starts[i], rows[i]);

    if (out_.queries > 0) {
      const double mean = 1.0 / static_cast<double>(out_.queries * groups_);
      for (at::Tensor* t : {&out_.loss, &out_.teacher_entropy, &out_.covered, &out_.covered_oracle,
                            &out_.grad_query, &out_.grad_key, &out_.grad_weight})
        if (t->defined()) t->mul_(mean);
    }
    return out_;
  }

 private:
  std::vector<int64_t> chosen_rows(int64_t tokens) const {
    std::vector<int64_t> rows;
    if (!in_.query_rows.defined()) {
      rows.resize(tokens);
      for (int64_t i = 0; i < tokens; ++i) rows[i] = i;
      return rows;
    }
    const at::Tensor list = in_.query_rows.to(at::kCPU, at::kLong).contiguous();
    rows.assign(list.data_ptr<int64_t>(), list.data_ptr<int64_t>() + list.numel());
    for (size_t i = 0; i < rows.size(); ++i)
      if (rows[i] < 0 || rows[i] >= tokens || (i > 0 && rows[i] <= rows[i - 1]))
        fail("layer_loss: query_rows must ascend within {} tokens, found {} at index {}", tokens, rows[i], i);
    return rows;
  }

  void run_document(int64_t start, int64_t length, const std::vector<Row>& rows) {
    const int64_t group_heads = query_.size(1) / key_.size(1);
    // Per row and key: the logits and softmax of one key-value head, the selector's dots and their gradient,
    // and about ten maps of scores, masses and masks for each group.
    const int64_t row_bytes = (2 * group_heads + 2 * heads_ + 10 * groups_) * length *
                              static_cast<int64_t>(c10::elementSize(type_));
    const int64_t bytes =
        options_.tile_bytes > 0 ? options_.tile_bytes : (query_.is_cpu() ? 24 : 512) * (int64_t{1} << 20);
    const int64_t tile = options_.tile_rows > 0
                             ? options_.tile_rows
                             : std::clamp<int64_t>(bytes / std::max<int64_t>(row_bytes, 1), 16, 1024);
    const auto count = static_cast<int64_t>(rows.size());
    for (int64_t first = 0; first < count; first += tile)
      run_tile(start, length, rows.data() + first, std::min(tile, count - first));
  }

  // Mean over each group's query heads of the softmax over all earlier positions: [R, G, padded], the first
  // `width` keys of it (all keys enter the softmax). index [R]: the queries' tokens; positions [R, 1]: those
  // in the document.
  at::Tensor teacher_mass(int64_t start, const at::Tensor& index, const at::Tensor& positions,
                          int64_t first_position, int64_t last_position, int64_t width,
                          int64_t padded) const {
    const int64_t kv_heads = key_.size(1), group_heads = query_.size(1) / kv_heads, rows = index.size(0);
    const int64_t keys = last_position + 1;
    const at::Tensor query = query_.index_select(0, index);
    // Only columns behind the tile's first query can be in some query's future.
    const int64_t tail = first_position + 1;
    const at::Tensor future = at::arange(tail, keys, index.options())
                                  .unsqueeze(0)
                                  .gt(positions)
                                  .unsqueeze(0);  // [1, R, keys - tail]
    at::Tensor mass = at::zeros({rows, groups_, padded}, query_.options().dtype(type_));
    for (int64_t h = 0; h < kv_heads; ++h) {
      const at::Tensor q =
          query.narrow(1, h * group_heads, group_heads).transpose(0, 1).reshape({group_heads * rows, -1});
      const at::Tensor k = key_.narrow(0, start, keys).select(1, h).t();
      // The scale goes into the query, unless that would round it once more.
      at::Tensor logits = matmul_wide_ ? at::mm(q, k, at::kFloat).mul_(in_.scale) : at::mm(q * in_.scale, k);
      logits = logits.view({group_heads, rows, keys});
      if (tail < keys) logits.narrow(2, tail, keys - tail).masked_fill_(future, -kInfinity);
      mass.select(1, h * groups_ / kv_heads)
          .narrow(1, 0, width)
          .add_(at::softmax(logits, -1).narrow(2, 0, width).sum(0));
    }
    return mass.mul_(static_cast<double>(groups_) / static_cast<double>(query_.size(1)));
  }

  void run_tile(int64_t start, int64_t length, const Row* rows, int64_t count) {
    const int64_t block = options_.block_size;
    int64_t width = 0;  // the tile's active keys end here
    at::Tensor bounds = at::empty({3, count, 1}, at::kLong);
    auto* b = bounds.data_ptr<int64_t>();
    for (int64_t i = 0; i < count; ++i) {
      b[i] = rows[i].position;
      b[count + i] = rows[i].low;
      b[2 * count + i] = rows[i].high;
      width = std::max(width, rows[i].high);
    }
    bounds = bounds.to(query_.device());
    const at::Tensor index = bounds[0].squeeze(1) + start;
    const int64_t padded = (width + block - 1) / block * block;
    const at::Tensor column = at::arange(padded, index.options()).unsqueeze(0);
    const at::Tensor inactive = (column < bounds[1]).logical_or_(column >= bounds[2]).unsqueeze(1);

    at::Tensor mass =
        teacher_mass(start, index, bounds[0], rows[0].position, rows[count - 1].position, width, padded);
    mass.masked_fill_(inactive, 0.0);

    // With a shared key the heads are rows of one product; with a key per head they are a batch.
    const bool shared = selector_key_.size(1) == 1;
    const int64_t real = std::min(padded, length), dim = selector_query_.size(2);
    const at::Tensor q = selector_query_.index_select(0, index);  // [R, heads, dim]
    const at::Tensor w = weight_.index_select(0, index);          // [R, G, heads]
    at::Tensor k = selector_key_.narrow(0, start, real).transpose(0, 1);
    if (padded > length) k = at::constant_pad_nd(k, {0, 0, 0, padded - length});  // [key heads, padded, dim]
    const at::Tensor dots = (shared ? at::mm(q.view({-1, dim}), k[0].t()).view({count, heads_, padded})
                                    : at::bmm(q.transpose(0, 1), k.transpose(1, 2)).transpose(0, 1))
                                .relu_();  // [R, heads, padded]
    at::Tensor scores = at::bmm(w, dots);  // [R, G, padded]
    // Comparisons drop NaN silently; this does not.
    const at::Tensor top = dots.amax();
    out_.loss += top - top;
    scores.masked_fill_(inactive, -kInfinity);

    measure(mass, scores, bounds);
    at::Tensor grad;  // of the sum over rows with respect to scores
    const int64_t k_train = options_.loss == DistillLoss::dense ? padded : options_.k_train;
    if (options_.teacher == Teacher::token) {
      grad = divergence(scores, mass, k_train, options_.rest_bucket, out_.loss);
    } else {
      const auto [best, where] = at::max(scores.view({count, groups_, padded / block, block}), -1);
      const at::Tensor peak = mass.view({count, groups_, padded / block, block}).amax(-1);
      const at::Tensor block_grad = divergence(best, peak, k_train / block, options_.rest_bucket, out_.loss);
      grad = at::zeros({count, groups_, padded / block, block}, block_grad.options())
                 .scatter_(-1, where.unsqueeze(-1), block_grad.unsqueeze(-1))
                 .view({count, groups_, padded});
    }

    if (!options_.gradients) return;
    out_.grad_weight.index_copy_(0, index, at::bmm(grad, dots.transpose(1, 2)));
    const at::Tensor dots_grad = at::bmm(w.transpose(1, 2), grad).mul_(dots > 0.0);  // [R, heads, padded]
    at::Tensor key_grad = out_.grad_key.narrow(0, start, real);                      // [real, key heads, dim]
    if (shared) {
      const at::Tensor flat = dots_grad.view({count * heads_, padded});
      out_.grad_query.index_copy_(0, index, at::mm(flat, k[0]).view({count, heads_, dim}));
      key_grad.select(1, 0).add_(at::mm(flat.t(), q.view({-1, dim})).narrow(0, 0, real));
    } else {
      const at::Tensor by_head = dots_grad.transpose(0, 1);
      out_.grad_query.index_copy_(0, index, at::bmm(by_head, k).transpose(0, 1));
      key_grad.add_(at::bmm(by_head.transpose(1, 2), q.transpose(0, 1)).narrow(1, 0, real).transpose(0, 1));
    }
  }

  void measure(const at::Tensor& mass, const at::Tensor& scores, const at::Tensor& bounds) {
    const double tiny = type_ == at::kDouble ? 1e-300 : 1e-37;
    const at::Tensor sum = mass.sum(-1, true), total = sum.clamp_min(tiny);  // [R, G, 1]
    // Entropy of mass / total, without another map.
    out_.teacher_entropy +=
        ((at::xlogy(sum, sum) - at::xlogy(mass, mass).sum(-1, true)) / total).sum(at::kDouble);
    if (options_.budgets.empty()) return;
    const int64_t block = options_.block_size, blocks = mass.size(2) / block;
    const at::Tensor block_mass = mass.view({mass.size(0), groups_, blocks, block}).sum(-1) / total;
    const at::Tensor block_score = scores.view({mass.size(0), groups_, blocks, block}).amax(-1);
    const at::Tensor active = (bounds[2] - bounds[1]).to(at::kDouble);  // [R, 1]
    const auto cumulative = [&](const at::Tensor& rank_by) {
      const at::Tensor order =
          std::get<1>(at::sort(rank_by, /*stable=*/true, /*dim=*/-1, /*descending=*/true));
      return at::cumsum(block_mass.gather(-1, order), -1);
    };
    const at::Tensor student = cumulative(block_score), oracle = cumulative(block_mass);
    for (size_t i = 0; i < options_.budgets.size(); ++i) {
      const double budget = options_.budgets[i];
      const at::Tensor wanted = budget < 1.0 ? active * budget : at::full_like(active, budget);
      const at::Tensor last = (wanted / static_cast<double>(block))
                                  .ceil_()
                                  .clamp_(1.0, static_cast<double>(blocks))
                                  .sub_(1.0)
                                  .to(at::kLong)
                                  .unsqueeze(1)
                                  .expand({-1, groups_, -1});
      const auto slot = static_cast<int64_t>(i);
      out_.covered[slot] += student.gather(-1, last).sum(at::kDouble);
      out_.covered_oracle[slot] += oracle.gather(-1, last).sum(at::kDouble);
    }
  }

  const LayerLossOptions& options_;
  const LayerLossInputs& in_;
  at::ScalarType type_;  // of accumulation
  bool matmul_wide_;     // half-precision inputs whose products the device accumulates and returns in float32
  int64_t groups_, heads_;
  at::Tensor query_, key_, selector_query_, selector_key_, weight_;
  LayerLoss out_;
};

}  // namespace

LayerLoss layer_loss(const LayerLossInputs& inputs, const LayerLossOptions& options) {
  const at::NoGradGuard no_grad;
  check(inputs, options);
  return Distiller(inputs, options).run();
}

}  // namespace spot
