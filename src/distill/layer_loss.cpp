#include "distill/layer_loss.h"

#include <ATen/core/grad_mode.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "distill/coverage.h"
#include "distill/divergence.h"
#include "ops/distill/distill.h"

namespace spot {
namespace {

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
  if (in.logsumexp.defined() && (in.logsumexp.dim() != 2 || in.logsumexp.size(0) != in.query.size(1) ||
                                 in.logsumexp.size(1) != in.query.size(0)))
    fail("layer_loss: logsumexp {} must be [{}, {}]", shape(in.logsumexp), in.query.size(1),
         in.query.size(0));
  if (o.block_size < 1 || o.measured_queries < 0 || o.sinks < 0 || o.recency < 0 || o.tile_rows < 0 ||
      o.tile_bytes < 0)
    fail(
        "layer_loss: block_size must be positive; sinks, recency, measured_queries, tile_rows and tile_bytes "
        "must not be negative");
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

class Distiller {
 public:
  Distiller(const LayerLossInputs& in, const LayerLossOptions& options)
      : options_(options),
        in_(in),
        type_(in.query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        matmul_wide_(is_half(in.query) && is_half(in.key)),
        selector_wide_(is_half(in.selector_query) && is_half(in.selector_key)),
        groups_(in.selector_weight.size(1)),
        heads_(in.selector_query.size(1)),
        query_(matmul_wide_ ? in.query : in.query.to(type_)),
        key_(matmul_wide_ ? in.key : in.key.to(type_)),
        selector_query_(selector_wide_ ? in.selector_query : in.selector_query.to(type_)),
        selector_key_(selector_wide_ ? in.selector_key : in.selector_key.to(type_)),
        weight_(in.selector_weight.to(type_)) {
    const auto sums = query_.options().dtype(at::kDouble), wide = query_.options().dtype(type_);
    const auto count = static_cast<int64_t>(options.budgets.size());
    out_.loss = at::zeros({}, sums);
    out_.teacher_entropy = at::zeros({}, sums);
    out_.covered = at::zeros({count}, sums);
    out_.covered_oracle = at::zeros({count}, sums);
    if (options.gradients) {
      out_.grad_query = at::zeros(selector_query_.sizes(), wide);
      // Heads outside, as products by head want it.
      out_.grad_key = at::zeros({selector_key_.size(1), selector_key_.size(0), selector_key_.size(2)}, wide)
                          .transpose(0, 1);
      out_.grad_weight = at::zeros_like(weight_);
    }
  }

  LayerLoss run() {
    const int64_t tokens = query_.size(0);
    std::vector<int64_t> starts = in_.document_starts;
    if (starts.empty()) starts.push_back(0);
    starts.push_back(tokens);

    std::vector<Query> queries;
    size_t document = 0;
    for (int64_t token : chosen_rows(tokens)) {
      while (token >= starts[document + 1]) ++document;
      const Row row = make_row(token - starts[document], options_);
      if (row.high > row.low) queries.push_back({document, row});
    }
    out_.queries = static_cast<int64_t>(queries.size());
    const std::vector<Query> measured = measured_among(queries);
    if (options_.measured_queries > 0 && !options_.budgets.empty())
      run_documents(starts, measured, Task::coverage);
    const bool measure_all = options_.measured_queries == 0 && !options_.budgets.empty();
    if (use_operators() && !measure_all) {
      // Rows that see no more than k_train keys need no choice.
      const auto dense = [&](const Query& q) {
        return options_.loss == DistillLoss::dense || q.row.high - q.row.low <= options_.k_train;
      };
      const auto split = std::stable_partition(queries.begin(), queries.end(), dense);
      run_strips(starts, {queries.begin(), split}, 0);
      queries.erase(queries.begin(), split);
      if (!options_.rest_bucket) {
        run_strips(starts, queries, options_.k_train);
        queries.clear();
      }
    }
    run_documents(starts, queries, measure_all ? Task::both : Task::loss);

    // Without a query all sums are zero.
    const double mean = 1.0 / static_cast<double>(std::max<int64_t>(out_.queries, 1) * groups_);
    for (at::Tensor* t : {&out_.loss, &out_.teacher_entropy}) t->mul_(mean);
    if (options_.gradients) {
      finish(out_.grad_query, in_.selector_query, mean);
      finish(out_.grad_key, in_.selector_key, mean);
      finish(out_.grad_weight, in_.selector_weight, mean);
    }
    if (out_.queries > 0) {
      const double measured_mean =
          1.0 / (static_cast<double>(measured.size()) * static_cast<double>(groups_));
      for (at::Tensor* t : {&out_.covered, &out_.covered_oracle}) t->mul_(measured_mean);
    }
    return out_;
  }

 private:
  void finish(at::Tensor& grad, const at::Tensor& like, double mean) const {
    const double factor = mean * options_.gradient_weight;
    if (!options_.gradients_rounded || grad.scalar_type() == like.scalar_type()) {
      grad.mul_(factor);
      return;
    }
    at::Tensor rounded = at::empty(grad.sizes(), grad.options().dtype(like.scalar_type()));
    at::mul_out(rounded, grad, at::scalar_tensor(factor, grad.options().device(at::kCPU)));
    grad = rounded;
  }

  // A counted query and what is taken of it in a tile.
  struct Query {
    size_t document;
    Row row;
  };
  enum class Task { loss, coverage, both };

  // Runs of neighbours: with many documents single queries would make as many tiles.
  std::vector<Query> measured_among(const std::vector<Query>& queries) const {
    const int64_t total = out_.queries, wanted = options_.measured_queries;
    if (wanted == 0 || wanted >= total) return queries;
    const int64_t length = std::min<int64_t>(wanted, 16), runs = wanted / length;
    std::vector<Query> measured;
    for (int64_t r = 1; r <= runs; ++r)
      measured.insert(measured.end(), queries.begin() + r * total / runs - length,
                      queries.begin() + r * total / runs);
    return measured;
  }

  // Half-precision inputs whose products the device accumulates and returns in float32.
  static bool is_half(const at::Tensor& x) {
    return x.is_cuda() && (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf);
  }
  static at::Tensor product(const at::Tensor& a, const at::Tensor& b, bool wide) {
    if (a.dim() == 2) return wide ? at::mm(a, b, at::kFloat) : at::mm(a, b);
    return wide ? at::bmm(a, b, at::kFloat) : at::bmm(a, b);
  }

  // Whether losses that the operators know go to them.
  bool use_operators() const {
    using Operators = LayerLossOptions::Operators;
    if (options_.operators == Operators::never || !in_.logsumexp.defined() ||
        options_.teacher != Teacher::token || groups_ != 1 ||
        in_.query.scalar_type() != in_.key.scalar_type() ||
        in_.selector_query.scalar_type() != in_.selector_key.scalar_type())
      return false;
    return options_.operators == Operators::always ||
           (ops::fuses_mass(in_.query, in_.key) && ops::fuses_kl(in_.selector_query, in_.selector_key));
  }

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

  // Strips of consecutive queries, of whatever documents.
  void run_strips(const std::vector<int64_t>& starts, const std::vector<Query>& queries, int64_t k_train) {
    at::Tensor grad_key = options_.gradients ? out_.grad_key.transpose(0, 1) : at::Tensor();
    const at::Tensor weight = weight_.select(1, 0);
    const auto count = static_cast<int64_t>(queries.size());
    std::vector<at::Tensor> losses, entropies;
    for (int64_t first = 0, rows = 0; first < count; first += rows) {
      const auto start = [&](int64_t i) { return starts[queries[static_cast<size_t>(i)].document]; };
      const auto row = [&](int64_t i) -> const Row& { return queries[static_cast<size_t>(i)].row; };
      const int64_t first_key = start(first) + row(first).low;
      // Per row and column: teacher and scores in float32, and four gradients of dots in bfloat16.
      rows = strip_rows(16 * (query_.size(0) - first_key));
      rows = std::min(rows, count - first);
      at::Tensor lists = at::empty({3, rows}, at::kInt);
      auto* list = lists.data_ptr<int32_t>();
      for (int64_t i = 0; i < rows; ++i) {
        list[i] = static_cast<int32_t>(start(first + i) + row(first + i).position);
        list[rows + i] = static_cast<int32_t>(start(first + i) + row(first + i).low);
        list[2 * rows + i] = static_cast<int32_t>(start(first + i) + row(first + i).high - 1);
      }
      const int64_t end = list[3 * rows - 1] + 1, first_token = list[0], last_token = list[rows - 1];
      lists = on_device(lists);
      const ops::QueryStrip strip{lists[0], lists[1], lists[2], first_key, (end - first_key + 7) / 8 * 8};
      const ops::TeacherMass::Result teacher =
          ops::teacher_mass({in_.query, in_.key, in_.logsumexp, strip, in_.scale, 1});
      const ops::SelectorKl::Result kl =
          ops::selector_kl({teacher.mass.select(1, 0), teacher.total.select(1, 0), in_.selector_query,
                            in_.selector_key, weight, strip, k_train, grad_key});
      losses.push_back(kl.loss);
      entropies.push_back(kl.entropy);
      if (!options_.gradients) continue;
      at::Tensor grad_weight = out_.grad_weight.select(1, 0);
      if (last_token - first_token + 1 == rows) {
        out_.grad_query.narrow(0, first_token, rows).copy_(kl.grad_query);
        grad_weight.narrow(0, first_token, rows).copy_(kl.grad_weight);
      } else {
        const at::Tensor index = strip.tokens.to(at::kLong);
        out_.grad_query.index_copy_(0, index, kl.grad_query);
        grad_weight.index_copy_(0, index, kl.grad_weight);
      }
    }
    if (count == 0) return;
    out_.loss += at::cat(losses).sum(at::kDouble);
    out_.teacher_entropy += at::cat(entropies).sum(at::kDouble);
  }

  int64_t strip_rows(int64_t row_bytes) const {
    const int64_t bytes = options_.tile_bytes > 0 ? options_.tile_bytes : int64_t{512} << 20;
    return options_.tile_rows > 0 ? options_.tile_rows
                                  : std::clamp<int64_t>(bytes / row_bytes / 128, 1, 16) * 128;
  }

  // Unpinned memory: the copy takes it up before it returns, without waiting for the device's work.
  at::Tensor on_device(const at::Tensor& small) const {
    return small.to(query_.device(), /*non_blocking=*/true);
  }

  void run_documents(const std::vector<int64_t>& starts, const std::vector<Query>& queries, Task task) {
    std::vector<Row> rows;
    for (size_t i = 0; i < queries.size(); ++i) {
      const size_t document = queries[i].document;
      rows.push_back(queries[i].row);
      if (i + 1 < queries.size() && queries[i + 1].document == document) continue;
      run_document(starts[document], starts[document + 1] - starts[document], rows, task);
      rows.clear();
    }
  }

  void run_document(int64_t start, int64_t length, const std::vector<Row>& rows, Task task) {
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
      run_tile(start, length, rows.data() + first, std::min(tile, count - first), task);
  }

  // Mean over each group's query heads of the softmax over all earlier positions: [R, G, padded], the first
  // `width` keys of it (all keys enter the softmax); anything where a query does not see. index [R]: the
  // queries' tokens; bounds [3, R, 1]: each Row.
  at::Tensor teacher_mass(int64_t start, const at::Tensor& index, const at::Tensor& bounds,
                          int64_t first_position, int64_t last_position, int64_t width,
                          int64_t padded) const {
    if (in_.logsumexp.defined() && options_.operators != LayerLossOptions::Operators::never &&
        (options_.operators == LayerLossOptions::Operators::always || ops::fuses_mass(in_.query, in_.key))) {
      const at::Tensor lists = (bounds.squeeze(2) + start).to(at::kInt);
      const ops::QueryStrip strip{lists[0], lists[1], lists[2] - 1, start, padded};
      return ops::teacher_mass({in_.query, in_.key, in_.logsumexp, strip, in_.scale, groups_}).mass;
    }
    const int64_t kv_heads = key_.size(1), group_heads = query_.size(1) / kv_heads, rows = index.size(0);
    const int64_t keys = last_position + 1;
    const at::Tensor query = query_.index_select(0, index);
    // Only columns behind the tile's first query can be in some query's future.
    const int64_t tail = first_position + 1;
    const at::Tensor future = at::arange(tail, keys, index.options())
                                  .unsqueeze(0)
                                  .gt(bounds[0])
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

  void run_tile(int64_t start, int64_t length, const Row* rows, int64_t count, Task task) {
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
    bounds = on_device(bounds);
    const at::Tensor index = bounds[0].squeeze(1) + start;
    const int64_t padded = (width + block - 1) / block * block;
    const at::Tensor column = at::arange(padded, index.options()).unsqueeze(0);
    const at::Tensor inactive = (column < bounds[1]).logical_or_(column >= bounds[2]).unsqueeze(1);

    at::Tensor mass =
        teacher_mass(start, index, bounds, rows[0].position, rows[count - 1].position, width, padded);
    mass.masked_fill_(inactive, 0.0);

    // With a shared key the heads are rows of one product; with a key per head they are a batch.
    const bool shared = selector_key_.size(1) == 1;
    const int64_t real = std::min(padded, length), dim = selector_query_.size(2);
    const at::Tensor q = selector_query_.index_select(0, index);  // [R, heads, dim]
    const at::Tensor w = weight_.index_select(0, index);          // [R, G, heads]
    at::Tensor k = selector_key_.narrow(0, start, real).transpose(0, 1);
    if (padded > length) k = at::constant_pad_nd(k, {0, 0, 0, padded - length});  // [key heads, padded, dim]
    const at::Tensor dots =
        (shared ? product(q.view({-1, dim}), k[0].t(), selector_wide_).view({count, heads_, padded})
                : product(q.transpose(0, 1), k.transpose(1, 2), selector_wide_).transpose(0, 1))
            .relu_();                      // [R, heads, padded]
    at::Tensor scores = at::bmm(w, dots);  // [R, G, padded]
    // Comparisons drop NaN silently; this does not.
    const at::Tensor top = dots.amax();
    out_.loss += top - top;
    scores.masked_fill_(inactive, -kInfinity);

    if (task != Task::loss)
      add_coverage(mass, scores, bounds[2] - bounds[1], options_.block_size, options_.budgets, out_.covered,
                   out_.covered_oracle);
    if (task == Task::coverage) return;
    const at::Tensor sum = mass.sum(-1, true);  // [R, G, 1]
    // Entropy of mass / sum, without another map.
    out_.teacher_entropy +=
        ((at::xlogy(sum, sum) - at::xlogy(mass, mass).sum(-1, true)) / sum.clamp_min(smallest_mass(type_)))
            .sum(at::kDouble);
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
    at::Tensor dots_grad = at::bmm(w.transpose(1, 2), grad).mul_(dots > 0.0);  // [R, heads, padded]
    // Half-precision products are many times faster; float16 has too few exponents for these numbers.
    const bool wide = selector_wide_ && q.scalar_type() == at::kBFloat16;
    if (wide) dots_grad = dots_grad.to(at::kBFloat16);
    const at::Tensor q_factor = wide ? q : q.to(type_), k_factor = wide ? k : k.to(type_);
    at::Tensor key_grad = out_.grad_key.narrow(0, start, real);  // [real, key heads, dim]
    if (shared) {
      const at::Tensor flat = dots_grad.view({count * heads_, padded});
      out_.grad_query.index_copy_(0, index, product(flat, k_factor[0], wide).view({count, heads_, dim}));
      key_grad.select(1, 0).add_(product(flat.t(), q_factor.view({-1, dim}), wide).narrow(0, 0, real));
    } else {
      const at::Tensor by_head = dots_grad.transpose(0, 1);
      out_.grad_query.index_copy_(0, index, product(by_head, k_factor, wide).transpose(0, 1));
      key_grad.add_(product(by_head.transpose(1, 2), q_factor.transpose(0, 1), wide)
                        .narrow(1, 0, real)
                        .transpose(0, 1));
    }
  }

  const LayerLossOptions& options_;
  const LayerLossInputs& in_;
  at::ScalarType type_;               // of accumulation
  bool matmul_wide_, selector_wide_;  // see is_half
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
