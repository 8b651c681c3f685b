#include "attention/stack.h"

#include <algorithm>

#include "attention/dense.h"
#include "core/error.h"
#include "core/memory.h"
#include "ops/attention/attention.h"

namespace spot {
namespace {

// `count` sequences of a batch from `first` on, whose rows begin at `first_row`: views, but for query_starts.
Batch part_of(const Batch& batch, int64_t first, int64_t count, int64_t first_row, int64_t rows) {
  Batch part = batch;
  const auto cut = [&](std::vector<int64_t>& list) {
    list = {list.begin() + first, list.begin() + first + count};
  };
  cut(part.sequences), cut(part.starts), cut(part.query_lengths), cut(part.first_pages);
  part.num_decodes = std::clamp<int64_t>(batch.num_decodes - first, 0, count);
  for (at::Tensor* tensor : {&part.tokens, &part.positions, &part.slots})
    *tensor = tensor->narrow(0, first_row, rows);
  for (at::Tensor* tensor : {&part.page_table, &part.lengths, &part.state_slots})
    if (tensor->defined()) *tensor = tensor->narrow(0, first, count);
  part.query_starts = batch.query_starts.narrow(0, first, count + 1) - first_row;
  part.logit_rows = at::Tensor();
  return part;
}

// The rows of a part.
AttentionInputs inputs_of(const AttentionInputs& all, const Batch& batch, int64_t first_row, int64_t rows,
                          bool with_selector) {
  const auto cut = [&](const at::Tensor& t) { return t.defined() ? t.narrow(0, first_row, rows) : t; };
  AttentionInputs inputs{all.layer,      cut(all.hidden), cut(all.query), cut(all.key),
                         cut(all.value), all.scale,       batch,          true};
  if (with_selector)
    inputs.selector_query = cut(all.selector_query), inputs.selector_weight = cut(all.selector_weight);
  return inputs;
}

}  // namespace

AttentionStack::AttentionStack(const Backbone& backbone, const Selector* selector,
                               std::vector<MethodSpec> methods, const StackOptions& options)
    : model_(backbone.config()), selector_(selector), specs_(std::move(methods)) {
  if (specs_.empty()) fail("no attention method was given; name at least one of {}", attention_words());
  MemoryNeed need{.what = fmt::format("the cache of {} tokens", options.num_pages * kBlockSize),
                  .remedy = "use a shorter context, fewer sequences at once, or bfloat16",
                  .on_host = backbone.device().is_cpu()};
  if (options.num_pages > 1) {
    const AttentionStack one(backbone, selector, specs_,
                             {.num_sequences = 1, .kv_scales = options.kv_scales});
    need.bytes =
        static_cast<double>(options.num_pages) * static_cast<double>(one.cache_->pools().page_bytes()) +
        static_cast<double>(options.num_sequences + options.num_snapshots) *
            static_cast<double>(one.cache_->states().slot_bytes());
  }
  within_memory(need, [&] {
    cache_ = std::make_unique<ModelCache>(backbone.config(), options.num_pages, backbone.dtype(),
                                          backbone.device(), options.num_sequences, options.num_snapshots,
                                          options.kv_scales.get());
    for (const MethodSpec& spec : specs_) methods_.push_back(make_method(spec));
  });
  made_ = true;
  const TokenPool keys = cache_->pools().tokens("keys", model_.full_attention_layers().front());
  attends_on_device_ =
      ops::attends(at::empty({1, model_.num_heads, model_.head_dim}, keys.stored.options().dtype(keys.dtype)),
                   keys.stored);
}

// A policy with the stores that the method reads: one that is there, or a new one. Without stores a policy is cheap, and
// its own settings may be in it.
int64_t AttentionStack::policy_for(const MethodSpec& spec) {
  const AttentionMethod& row = attention_method(spec.word);
  check_selector(row, selector_ != nullptr);
  if (row.same_stores) {
    for (size_t i = 0; i < policy_specs_.size(); ++i)
      if (policy_specs_[i].word == spec.word && row.same_stores(policy_specs_[i], spec, selector_))
        return static_cast<int64_t>(i);
    if (made_)
      fail(
          "attention '{}' reads what is kept of every token, and this was not kept from the start; name it when the "
          "engine is made",
          spec.name);
  }
  Policy made = row.make(spec, model_, selector_, cache_->pools());
  size_t place = 0;  // where a method without stores was replaced, or a new one
  while (place < policies_.size() && policies_[place].policy) ++place;
  if (place == policies_.size()) policies_.emplace_back(), policy_specs_.emplace_back();
  policies_[place] = std::move(made);
  policy_specs_[place] = spec;
  return static_cast<int64_t>(place);
}

AttentionStack::Method AttentionStack::make_method(const MethodSpec& spec) {
  Method method;
  const TokenPool keys = cache_->pools().tokens("keys", model_.full_attention_layers().front());
  check_kv_cache(keys.has_codes() ? KvCacheDtype::fp8 : KvCacheDtype::automatic, spec);
  const AttentionMethod& row = attention_method(spec.word);
  if (!row.make) return method;
  method.policy = policy_for(spec);
  method.shares = row.same_stores != nullptr;
  SparseOptions sparse{
      .dense_layers = spec.dense_layers,
      .query_tile = spec.query_tile == 0 ? default_query_tile(cache_->device()) : spec.query_tile};
  sparse.count = false;
  sparse.observer = observer_;
  sparse.recorder = [this](int64_t layer, const Selection& selection, const at::Tensor& lengths) {
    const bool chunk = attending_->batch.num_decodes == 0;
    if (!chunk || attending_->selects)
      records_.push_back({layer, attending_->first, chunk, selection, lengths});
  };
  method.sparse = std::make_unique<SparseAttention>(
      *cache_, *policies_[static_cast<size_t>(method.policy)].policy, std::move(sparse));
  return method;
}

int64_t AttentionStack::add_method(const MethodSpec& spec) {
  methods_.push_back(make_method(spec));
  specs_.push_back(spec);
  return static_cast<int64_t>(specs_.size()) - 1;
}

void AttentionStack::replace_method(int64_t method, const MethodSpec& spec) {
  Method made = make_method(spec), &old = methods_.at(static_cast<size_t>(method));
  if (old.policy >= 0 && !old.shares) policies_[static_cast<size_t>(old.policy)] = {};
  old = std::move(made);
  specs_[static_cast<size_t>(method)] = spec;
}

bool AttentionStack::decodes_on_device(int64_t method) const {
  return attends_on_device_ &&
         attention_method(specs_.at(static_cast<size_t>(method)).word).decodes_on_device;
}

void AttentionStack::set_observer(const SelectionObserver& observer) {
  observer_ = observer;
  for (Method& method : methods_)
    if (method.sparse) method.sparse->set_observer(observer);
}

void AttentionStack::begin_pass(const Batch& batch, const std::vector<Route>& routes) {
  records_.clear();
  parts_.clear();
  prepared_ = -1;
  const int64_t sequences = batch.num_sequences();
  if (!routes.empty() && static_cast<int64_t>(routes.size()) != sequences)
    fail("a batch of {} sequences was given {} routes", sequences, routes.size());
  int64_t row = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const Route route = routes.empty() ? Route{} : routes[static_cast<size_t>(i)];
    const MethodSpec& spec = specs_.at(static_cast<size_t>(route.method));
    const bool decode = i < batch.num_decodes;
    Part part{.method = route.method, .first = i, .first_row = row};
    part.sparse = !spec.is_dense() && (decode || route.selects || spec.reads_sparsely(route.context));
    part.selects = part.sparse && !decode && route.selects;
    // Decode rows of a sparse method stand apart from its chunks, which are read in another way.
    const bool alike =
        !parts_.empty() && !part.selects && parts_.back().sparse == part.sparse &&
        (!part.sparse || (parts_.back().method == part.method && parts_.back().selects == part.selects &&
                          (decode || parts_.back().first >= batch.num_decodes)));
    if (!alike) parts_.push_back(std::move(part));
    parts_.back().rows += batch.query_lengths[static_cast<size_t>(i)];
    row += batch.query_lengths[static_cast<size_t>(i)];
  }
  for (size_t p = 0; p < parts_.size(); ++p) {
    Part& part = parts_[p];
    const int64_t end = p + 1 < parts_.size() ? parts_[p + 1].first : sequences;
    part.batch =
        parts_.size() == 1 ? batch : part_of(batch, part.first, end - part.first, part.first_row, part.rows);
  }
}

// The kernel that makes queries and keys serves one selector: that of the first sparse rows, if there are any.
AttentionPreparation AttentionStack::prepare(int64_t layer, const at::Tensor& hidden, const Batch& batch) {
  AttentionPreparation wanted;
  prepared_ = -1;
  if (batch.is_decode()) {
    int64_t method = -1;
    for (const Part& part : parts_)
      if (part.sparse && method < 0) method = part.method;
    for (size_t m = 0; m < methods_.size() && method < 0; ++m)
      if (methods_[m].sparse) method = static_cast<int64_t>(m);
    if (method >= 0) {
      prepared_ = methods_[static_cast<size_t>(method)].policy;
      SelectionPolicy& policy = *policies_[static_cast<size_t>(prepared_)].policy;
      if (policy.covers(layer) && !specs_[static_cast<size_t>(method)].dense_layers.count(layer))
        wanted = policy.prepare(layer, hidden, batch.positions);
    }
  }
  wanted.pools = kv_pools(cache_->pools(), layer);
  wanted.slots = batch.slots;
  return wanted;
}

at::Tensor AttentionStack::forward(const AttentionInputs& inputs) {
  const int64_t layer = inputs.layer;
  if (parts_.empty()) fail("begin_pass() must come before a forward pass through an attention stack");
  if (!inputs.stored)
    write_tokens(kv_pools(cache_->pools(), layer), inputs.batch.slots, inputs.key, inputs.value);
  const int64_t rows = inputs.query.size(0);
  for (size_t p = 0; p < policies_.size(); ++p) {
    SelectionPolicy* policy = policies_[p].policy.get();
    if (policy && policy->covers(layer))
      policy->append(inputs_of(inputs, inputs.batch, 0, rows, static_cast<int64_t>(p) == prepared_));
  }
  const auto is_prepared = [&](const Part& part) {
    return prepared_ >= 0 && methods_[static_cast<size_t>(part.method)].policy == prepared_;
  };
  if (parts_.size() == 1)
    return attend(parts_[0], inputs_of(inputs, inputs.batch, 0, rows, is_prepared(parts_[0])));
  at::Tensor output = at::empty_like(inputs.query);
  for (const Part& part : parts_)
    output.narrow(0, part.first_row, part.rows)
        .copy_(attend(part, inputs_of(inputs, part.batch, part.first_row, part.rows, is_prepared(part))));
  return output;
}

at::Tensor AttentionStack::attend(const Part& part, const AttentionInputs& inputs) {
  if (!part.sparse) return attend_dense(inputs, kv_pools(cache_->pools(), inputs.layer));
  attending_ = &part;
  SparseAttention& sparse = *methods_[static_cast<size_t>(part.method)].sparse;
  // A policy of one method alone has its rule from its making.
  if (methods_[static_cast<size_t>(part.method)].shares)
    sparse.policy().set_rule(specs_[static_cast<size_t>(part.method)].rule);
  if (part.selects) return sparse.attend_queries(inputs);
  return sparse.attend(inputs, PrefillMode::sparse, sparse.query_tile());
}

std::vector<AttendedRows> AttentionStack::attended() {
  std::vector<AttendedRows> all;
  for (const Part& part : parts_) {
    std::vector<at::Tensor> counts, chunk_sums;
    AttendedRows rows{.first = part.first};
    const Record* any = nullptr;
    for (const Record& record : records_) {
      if (record.first != part.first) continue;
      any = &record;
      if (!record.chunk) {
        const Selection& s = record.selection;
        counts.push_back(s.token_counts.defined() ? s.token_counts : s.counts);
        rows.layers.push_back(record.layer);
      } else {
        const auto [kept, visible] = count_tokens(record.selection, record.lengths);
        const at::Tensor sum =
            at::stack({at::full({}, static_cast<double>(record.selection.rows()), kept.options()), kept,
                       visible.to(at::kDouble)});
        if (rows.layers.empty() || rows.layers.back() != record.layer)
          rows.layers.push_back(record.layer), chunk_sums.push_back(sum);
        else
          chunk_sums.back() = chunk_sums.back() + sum;
      }
    }
    if (!any) continue;
    if (any->chunk) {
      rows.sums = at::stack(chunk_sums).unsqueeze(1);
    } else {
      const at::Tensor lengths = any->lengths.to(at::kDouble);
      at::Tensor kept = at::stack(counts).to(at::kDouble).mean(2);  // [layers, rows]
      // Every rule keeps a row's last block, which the row may not fill.
      if (!any->selection.token_counts.defined())
        kept = kept * kBlockSize - (-any->lengths).remainder(kBlockSize);
      rows.sums =
          at::stack({(lengths > 0).to(at::kDouble).expand_as(kept), kept, lengths.expand_as(kept)}, 2);
    }
    all.push_back(std::move(rows));
  }
  records_.clear();
  return all;
}

}  // namespace spot
