#include "distill/trainer.h"

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <set>

#include "core/checksum.h"
#include "core/error.h"
#include "core/files.h"
#include "core/notice.h"
#include "core/progress.h"
#include "core/stop_signals.h"
#include "distill/calibrate.h"
#include "distill/card.h"
#include "distill/distill_attention.h"
#include "distill/initialize.h"
#include "distill/metrics.h"
#include "distill/optimizer.h"

namespace spot {
namespace {
namespace fs = std::filesystem;

// A run that reads its text more often than this is warned of.
constexpr double kMostRepeats = 20;

std::string checkpoint_name(int64_t step) {
  return fmt::format("checkpoint-{:06}", step);
}

// The checkpoints in a run's folder, the newest last: one, or two after a crash between writing and removing. An
// unfinished one has another name; a folder without any of a run's files is no checkpoint, whatever it is called.
std::vector<fs::path> checkpoints_in(const fs::path& output) {
  std::vector<fs::path> found;
  std::error_code code;
  for (const auto& entry : fs::directory_iterator(output, code)) {
    const std::string name = entry.path().filename().string();
    const bool matches =
        name.starts_with("checkpoint-") && name.size() > 11 &&
        name.find_first_not_of("0123456789", 11) == std::string::npos &&
        (has_file(entry.path() / "train.json") || has_file(entry.path() / "optimizer.safetensors"));
    if (matches) found.push_back(entry.path());
  }
  // Longer numbers are larger; equal lengths compare as text.
  std::sort(found.begin(), found.end(), [](const fs::path& a, const fs::path& b) {
    return std::pair(a.filename().string().size(), a) < std::pair(b.filename().string().size(), b);
  });
  return found;
}

fs::path newest_checkpoint(const fs::path& output) {
  const std::vector<fs::path> found = checkpoints_in(output);
  return found.empty() ? fs::path() : found.back();
}

// Uniform among all subsets of `count` of `total` queries; ascending.
at::Tensor draw_query_rows(int64_t count, int64_t total, uint64_t seed, int64_t step, int64_t index) {
  std::seed_seq words{seed, seed >> 32, static_cast<uint64_t>(step), static_cast<uint64_t>(index)};
  std::mt19937_64 engine(words);
  std::set<int64_t> chosen;  // Floyd's algorithm
  for (int64_t i = total - count; i < total; ++i) {
    const auto candidate = static_cast<int64_t>(engine() % static_cast<uint64_t>(i + 1));
    if (!chosen.insert(candidate).second) chosen.insert(i);
  }
  return at::tensor(std::vector<int64_t>(chosen.begin(), chosen.end()), at::kLong);
}

class Run {
 public:
  Run(const Backbone& backbone, Selector& selector, const Encode& encode, int32_t end_of_text,
      const TrainConfig& config, const TrainHooks& hooks)
      : backbone_(backbone),
        selector_(selector),
        config_(config),
        hooks_(hooks),
        fingerprint_(backbone.fingerprint()),
        data_(config.data, encode, end_of_text),
        optimizer_(selector, config),
        attention_(selector, loss_options(selector.config(), config)) {}

  TrainResult run() {
    make_folder(config_.output);
    const fs::path checkpoint = newest_checkpoint(config_.output);
    if (!checkpoint.empty()) restore(checkpoint);
    check_replicas_agree();
    if (checkpoint.empty() && selector_.config().distillation.start == Start::backbone) start_from_backbone();
    if (is_writer()) remove_temporary_files(config_.output);
    if (is_writer()) log_.emplace(config_.output / "metrics.jsonl", step_);
    if (config_.held_out_sequences > 0 && !(finished() && !config_.calibrate))
      held_out_ = data_.held_out(config_.held_out_sequences);
    if (is_writer() && held_out_.empty() && config_.held_out_sequences > 0 && hooks_.show_progress)
      notice("No held-out text: {}.\n", config_.data.held_out_every == 0
                                            ? "--held-out-every is 0"
                                            : fmt::format("the corpus has too few documents for one in {}",
                                                          config_.data.held_out_every));
    if (is_writer() && checkpoint.empty() && hooks_.show_progress) look_at_first_sequence();
    if (config_.calibrate && config_.calibration_length > 0 && !held_out_.empty()) {
      calibration_contexts_ = data_.held_out(config_.held_out_sequences, config_.calibration_length);
      if (calibration_contexts_.empty())
        fail(
            "distillation: the held-out text has no {} tokens to calibrate on; lower calibration_length or give more text",
            config_.calibration_length);
    }

    const StopSignals signals(hooks_.handle_signals);
    std::optional<Progress> progress;
    if (is_writer() && hooks_.show_progress) {
      progress.emplace("Distilling", config_.steps);
      progress->start_from(step_);
    }
    while (!finished()) {
      const nlohmann::json metrics = take_step();
      last_ = metrics;
      if (log_) log_->add(metrics);
      if (progress) progress->update(step_, note(metrics));
      if (hooks_.on_step) hooks_.on_step(metrics);
      if (is_writer() && hooks_.show_progress) warn_of_little_text();
      const bool stop = any_replica(signals.received() || (hooks_.should_stop && hooks_.should_stop()));
      if (stop || finished()) {
        save_checkpoint();
      } else if (step_ % config_.checkpoint_interval == 0) {
        try {
          save_checkpoint();
        } catch (const Error& e) {  // the one before is still there, and the disk may have room the next time
          notice("Step {}: {}. Training goes on; the next checkpoint is due in {} steps.\n", step_, e.what(),
                 config_.checkpoint_interval);
        }
      }
      if (stop && !finished()) {
        progress.reset();
        return {TrainStatus::interrupted, step_, last_};
      }
    }
    progress.reset();
    finish();
    return {TrainStatus::finished, step_, last_};
  }

 private:
  bool finished() const { return step_ >= config_.steps; }
  bool is_writer() const { return hooks_.replicas.rank == 0; }

  static std::string note(const nlohmann::json& metrics) {
    std::string text = fmt::format("loss {:.4f}, {:.0f} tokens/s", metrics.at("loss").get<double>(),
                                   metrics.at("tokens_per_second").get<double>());
    if (metrics.contains("held_out_loss"))
      text += fmt::format(", held-out {:.4f}", metrics.at("held_out_loss").get<double>());
    return text;
  }

  void sum_over_replicas(std::vector<at::Tensor> tensors) const {
    if (hooks_.replicas.count > 1) hooks_.replicas.sum(tensors);
  }

  double sum_over_replicas(double value) const {
    const at::Tensor sum =
        at::full({1}, value, at::TensorOptions().dtype(at::kDouble).device(backbone_.device()));
    sum_over_replicas({sum});
    return sum.item<double>();
  }
  // A signal may reach one process alone, and all must leave the loop at the same step.
  bool any_replica(bool here) const { return sum_over_replicas(here ? 1.0 : 0.0) > 0.0; }

  // Replicas that train different runs would add up gradients that do not belong together.
  void check_replicas_agree() const {
    const Replicas& r = hooks_.replicas;
    const std::string run = fmt::format("{} {} {} {}", step_, fingerprint_, config_.to_json().dump(),
                                        selector_.config().to_json().dump());
    const auto mark = static_cast<double>(std::hash<std::string>{}(run) % (1 << 20));
    if (any_replica(sum_over_replicas(mark) != mark * static_cast<double>(r.count)))
      fail(
          "distillation: the {} processes do not continue the same run; give all the same options, model and output "
          "folder ({}, on a file system they share)",
          r.count, config_.output.string());
  }

  const std::vector<int64_t>& starts_of(const TokenSequence& s) const {
    return config_.document_mask ? s.documents : s.parts;
  }

  // A text that is read many times over is learned by heart; one shorter than a sequence is hardly meant.
  // Said as soon as the length of the text is known: at once where it is shorter than a sequence, else when it has been
  // read to its end.
  void warn_of_little_text() {
    if (warned_of_little_text_ || data_.corpus_tokens() == 0) return;
    warned_of_little_text_ = true;
    const double repeats = static_cast<double>(config_.steps) *
                           static_cast<double>(config_.sequences_per_step * config_.data.sequence_length) /
                           static_cast<double>(data_.corpus_tokens());
    if (repeats > kMostRepeats)
      notice("The training text has {} tokens, it is repeated {:.0f} times in this run: give more text.\n",
             data_.corpus_tokens(), repeats);
  }
  void look_at_first_sequence() {
    const nlohmann::json beginning = data_.state();
    data_.next();
    warn_of_little_text();
    data_.restore(beginning);
  }

  void start_from_backbone() {
    const nlohmann::json beginning = data_.state();
    std::vector<TokenSequence> sequences;
    const int64_t tokens = initialization_tokens(backbone_.config());
    while (static_cast<int64_t>(sequences.size()) * config_.data.sequence_length < tokens)
      sequences.push_back(data_.next());
    data_.restore(beginning);
    std::optional<Progress> progress;
    if (is_writer() && hooks_.show_progress)
      progress.emplace("Fitting the start", initialization_steps(selector_, sequences));
    initialize_from_backbone(backbone_, selector_, sequences, loss_options(selector_.config(), config_),
                             progress ? &*progress : nullptr);
    // Unlike devices round differently; all begin from the first one's weights.
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> weights;
    for (const at::Tensor& parameter : selector_.parameters())
      weights.push_back(is_writer() ? parameter.detach() : parameter.detach().zero_());
    sum_over_replicas(weights);
  }

  // One optimizer step; returns its metrics.
  nlohmann::json take_step() {
    const auto begin = std::chrono::steady_clock::now();
    optimizer_.zero_gradients();
    const double share = 1.0 / static_cast<double>(config_.sequences_per_step);
    const int64_t length = config_.data.sequence_length;
    for (int64_t i = 0; i < config_.sequences_per_step; ++i) {
      const TokenSequence sequence = data_.next();
      if (i % hooks_.replicas.count != hooks_.replicas.rank) continue;
      at::Tensor rows;
      if (config_.query_rows > 0 && config_.query_rows < length)
        rows = draw_query_rows(config_.query_rows, length, config_.data.seed, step_, i);
      attention_.begin(share, rows);
      forward_sequence(backbone_, attention_, sequence.tokens, starts_of(sequence));
    }
    at::Tensor sums = attention_.take_sums();
    sum_over_replicas({sums});
    sums = (sums * share).cpu();
    check_finite(sums);
    sum_over_replicas(optimizer_.gradients());
    const double rate = learning_rate(config_, step_);
    double norm = 0.0;
    try {
      norm = optimizer_.step(rate);
    } catch (const Error& e) {
      fail("step {}: {}", step_ + 1, e.what());
    }
    ++step_;

    nlohmann::json metrics = {{"step", step_}, {"lr", rate}, {"grad_norm", norm}, {"epoch", data_.epoch()}};
    metrics["tokens"] = step_ * config_.sequences_per_step * length;
    add_measures(metrics, sums, "");
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    metrics["seconds"] = seconds;
    metrics["tokens_per_second"] = static_cast<double>(config_.sequences_per_step * length) / seconds;
    if (!held_out_.empty() && (step_ == 1 || finished() || step_ % config_.held_out_interval == 0)) {
      measure_held_out(metrics);
    }
    return metrics;
  }

  void measure_held_out(nlohmann::json& metrics) {
    const Replicas& r = hooks_.replicas;
    const auto count = static_cast<int64_t>(held_out_.size());
    // The processes of a sharded backbone run equally many forward passes: where shares differ, each runs
    // all.
    const bool shared = !backbone_.is_sharded() || count % r.count == 0;
    std::vector<TokenSequence> own;
    for (int64_t i = 0; i < count; ++i)
      if (!shared || i % r.count == r.rank) own.push_back(held_out_[static_cast<size_t>(i)]);
    attention_.begin(0.0, {});
    for (const TokenSequence& sequence : own)
      forward_sequence(backbone_, attention_, sequence.tokens, starts_of(sequence));
    const at::Tensor sums = attention_.take_sums();
    const CalibrationOptions options;
    const at::Tensor captured = captured_sums(backbone_, selector_, own, options).to(backbone_.device());
    if (shared) sum_over_replicas({sums, captured});
    add_measures(metrics, sums.cpu() / static_cast<double>(held_out_.size()), "held_out_");

    const at::Tensor queries = captured.select(1, -1).cpu();
    if (queries.min().item<double>() == 0.0) return;  // too short for any residual blocks
    at::Tensor error = at::zeros_like(queries);
    for (size_t i = 0; i < options.p.size(); ++i) {
      const at::Tensor share = captured.select(1, static_cast<int64_t>(i)).cpu() / queries;
      add_measure(metrics, fmt::format("held_out_captured_p{:g}", options.p[i]), share);
      error += (share - options.p[i]).abs() / static_cast<double>(options.p.size());
    }
    add_measure(metrics, "held_out_calibration_error", error);
  }

  void check_finite(const at::Tensor& sums) const {
    for (size_t l = 0; l < selector_.layers().size(); ++l) {
      const double loss = sums[static_cast<int64_t>(l)][0].item<double>();
      if (!std::isfinite(loss))
        fail(
            "step {}: the loss of layer {} is {}; lower peak_lr, or run the backbone in float32 or bfloat16 "
            "if it overflows (checkpoints up to here are unharmed)",
            step_ + 1, selector_.layers()[l], loss);
    }
  }

  // sums: see DistillAttention::take_sums, as means over sequences.
  void add_measures(nlohmann::json& metrics, const at::Tensor& sums, const std::string& prefix) const {
    metrics["layers"] = selector_.layers();
    add_measure(metrics, prefix + "loss", sums.select(1, 0));
    add_measure(metrics, prefix + "teacher_entropy", sums.select(1, 1));
    const auto num_budgets = static_cast<int64_t>(config_.budgets.size());
    for (int64_t b = 0; b < num_budgets; ++b) {
      const double budget = config_.budgets[static_cast<size_t>(b)];
      add_measure(metrics, fmt::format("{}covered_{:g}", prefix, budget), sums.select(1, 2 + b));
      add_measure(metrics, fmt::format("{}covered_oracle_{:g}", prefix, budget),
                  sums.select(1, 2 + num_budgets + b));
    }
  }

  // A number and a list by layer: tools read tables of numbers, not nested objects.
  static void add_measure(nlohmann::json& metrics, const std::string& name, const at::Tensor& by_layer) {
    const at::Tensor values = by_layer.contiguous();
    metrics[name] = values.mean().item<double>();
    metrics[name + "_per_layer"] =
        std::vector<double>(values.data_ptr<double>(), values.data_ptr<double>() + values.numel());
  }

  // Writes a new folder beside the last checkpoint, gives it its name, and only then removes the old one.
  void save_checkpoint() {
    if (!is_writer()) return;
    log_->flush();
    const std::vector<fs::path> old = checkpoints_in(config_.output);
    const fs::path final_path = config_.output / checkpoint_name(step_);
    const fs::path unfinished = config_.output / "unfinished-checkpoint";
    remove_folder(unfinished);
    try {
      write_checkpoint(unfinished);
    } catch (const Error&) {
      remove_folder(unfinished);
      throw;
    }
    remove_folder(final_path);
    std::error_code code;
    fs::rename(unfinished, final_path, code);
    if (code) fail("{}: cannot be created: {}", final_path.string(), code.message());
    sync_folder(config_.output);
    for (const fs::path& path : old)
      if (path != final_path) remove_folder(path);
    try {
      write_loss_page(config_.output / "loss.html", log_->entries());
    } catch (const Error& e) {
      notice("{}. It is tried again with the next checkpoint.\n", e.what());
    }
  }

  void write_checkpoint(const fs::path& folder) const {
    make_folder(folder);
    selector_.save(folder, fingerprint_, notes());
    optimizer_.save(folder / "optimizer.safetensors");
    nlohmann::json state = {{"version", 1},
                            {"optimizer_checksum", checksum_of_file(folder / "optimizer.safetensors")},
                            {"step", step_},
                            {"threads", at::get_num_threads()},
                            {"config", config_.to_json()},
                            {"data", data_.state()},
                            {"last_metrics", last_}};
    seal(state);
    write_file_atomically(folder / "train.json", state.dump(1) + "\n");
  }

  void restore(const fs::path& checkpoint) {
    const fs::path path = checkpoint / "train.json";
    const nlohmann::json state = read_json(path);
    check_seal(state, path.string());
    try {
      check_file(checkpoint / "optimizer.safetensors", state.value("optimizer_checksum", nlohmann::json()));
      nlohmann::json stored = state.at("config"), ours = config_.to_json();
      for (const char* free : {"output", "data_paths", "held_out_sequences", "held_out_interval",
                               "checkpoint_interval", "calibrate", "calibration_length", "store"}) {
        stored.erase(free);
        ours.erase(free);
      }
      for (const auto& [name, value] : ours.items())
        if (!stored.contains(name) || stored.at(name) != value)
          fail("{}: the run was begun with {} = {}, now it is {}; resume with the same settings",
               path.string(), name, stored.contains(name) ? stored.at(name).dump() : "(absent)",
               value.dump());
      Selector saved = Selector::load(checkpoint.string(), "", backbone_.config(), backbone_.device(),
                                      selector_.parameters().front().scalar_type());
      if (!saved.made_for(fingerprint_))
        fail(
            "{}: the run was begun with other weights of the model (fingerprint {}, now {}); resume with the same",
            checkpoint.string(), saved.fingerprint(), fingerprint_);
      if (!(saved.config() == selector_.config()))
        fail("{}: the run was begun with another selector config; resume with the same settings",
             (checkpoint / "selector.json").string());
      const at::NoGradGuard no_grad;
      const auto from = saved.parameters(), to = selector_.parameters();
      for (size_t i = 0; i < to.size(); ++i) to[i].detach().copy_(from[i]);
      optimizer_.load(checkpoint / "optimizer.safetensors");
      data_.restore(state.at("data"));
      step_ = state.at("step");
      last_ = state.at("last_metrics");
      if (state.at("threads") != at::get_num_threads() && hooks_.show_progress && is_writer())
        notice(
            "Resuming with {} threads, the run was begun with {}: results agree to rounding, not bit for bit.\n",
            at::get_num_threads(), state.at("threads").get<int>());
    } catch (const nlohmann::json::exception& e) {
      fail("{}: not a training checkpoint ({}); remove it and start again", path.string(), e.what());
    }
  }

  nlohmann::json notes() const {
    nlohmann::json notes = {{"steps", step_},
                            {"tokens", step_ * config_.sequences_per_step * config_.data.sequence_length},
                            {"training", config_.to_json()}};
    if (last_.is_object()) notes["loss"] = last_.at("loss");
    if (last_.is_object() && last_.contains("held_out_loss"))
      notes["held_out_loss"] = last_.at("held_out_loss");
    if (!calibration_.is_null()) notes["calibration"] = calibration_;
    if (!mass_calibration_.is_null()) notes["mass_calibration"] = mass_calibration_;
    return notes;
  }

  // Every replica fits for itself: all selectors stay equal, and a sharded backbone needs all to take part.
  void finish() {
    if (config_.calibrate && !held_out_.empty()) {
      const Calibration fitted =
          calibrate(backbone_, selector_, calibration_contexts_.empty() ? held_out_ : calibration_contexts_,
                    {}, hooks_.show_progress && is_writer());
      selector_.selection().temperature = fitted.temperature;
      selector_.selection().residual_mass = fitted.residual_mass;
      selector_.selection().mass_table = fitted.mass_table;
      calibration_ = fitted.to_json();
      if (!fitted.mass_table.empty()) mass_calibration_ = fitted.mass_notes(config_.data.paths);
    }
    if (!is_writer()) return;
    selector_.save(config_.output, fingerprint_, notes(), weight_format_from_string(config_.store));
    const std::string name =
        (config_.output / "").parent_path().filename().string();  // also of a path that ends with a slash
    write_file_atomically(config_.output / "README.md",
                          selector_card(name, read_json(config_.output / "selector.json"), log_->entries()));
    write_loss_page(config_.output / "loss.html", log_->entries());
  }

  const Backbone& backbone_;
  Selector& selector_;
  const TrainConfig& config_;
  const TrainHooks& hooks_;
  std::string fingerprint_;
  TrainingData data_;
  SelectorOptimizer optimizer_;
  DistillAttention attention_;
  std::vector<TokenSequence> held_out_, calibration_contexts_;
  std::optional<MetricsLog> log_;
  bool warned_of_little_text_ = false;
  int64_t step_ = 0;
  nlohmann::json last_, calibration_, mass_calibration_;
};

}  // namespace

TrainResult distill(const Backbone& backbone, Selector& selector, const Encode& encode, int32_t end_of_text,
                    const TrainConfig& config, bool resume, const TrainHooks& hooks) {
  check_distillation(config, resume, backbone.config(), selector.config(), hooks.replicas,
                     backbone.is_sharded());
  if (resume && newest_checkpoint(config.output).empty() && hooks.show_progress && hooks.replicas.rank == 0)
    notice("{}: holds no checkpoint to resume; the run begins at its first step\n", config.output.string());
  return Run(backbone, selector, encode, end_of_text, config, hooks).run();
}

void check_distillation(const TrainConfig& config, bool resume, const ModelConfig& backbone,
                        const SelectorConfig& selector, const Replicas& replicas, bool sharded) {
  config.validate();
  check_width(weight_format_from_string(config.store), backbone.hidden_size, "distillation");
  const int64_t positions = backbone.max_position_embeddings;
  if (config.data.sequence_length > positions)
    fail("distillation: sequence_length is {}, the backbone reaches {} positions; ask for less",
         config.data.sequence_length, positions);
  if (config.calibration_length > positions)
    fail("distillation: calibration_length is {}, the backbone reaches {} positions; ask for less",
         config.calibration_length, positions);
  const SelectionRule& rule = selector.selection.rule;
  const int64_t least = int64_t{rule.sinks} + rule.recency + 2 * selector.block_size;
  if (selector.distillation.teacher_scope == TeacherScope::residual && config.data.sequence_length < least)
    fail(
        "distillation: of {} tokens the first {} and the last {} are left out, nothing remains to learn; give sequences of {} or "
        "more, or --teacher-scope all",
        config.data.sequence_length, rule.sinks, rule.recency, least);
  const Replicas& r = replicas;
  if (r.count < 1 || r.rank < 0 || r.rank >= r.count || (r.count > 1 && !r.sum))
    fail("distillation: there is no replica {} of {}", r.rank, r.count);
  if (config.sequences_per_step < r.count)
    fail(
        "distillation: {} processes cannot share a step of {} sequences; start fewer, or raise sequences_per_step",
        r.count, config.sequences_per_step);
  if (sharded && config.sequences_per_step % r.count != 0)
    fail(
        "distillation: with a sharded backbone all {} processes run in step, but {} sequences a step do not divide "
        "evenly among them; change sequences_per_step",
        r.count, config.sequences_per_step);
  const fs::path checkpoint = newest_checkpoint(config.output);
  if (!checkpoint.empty() && !resume)
    fail("{} already holds a run ({}); continue it with --resume, or choose another output folder",
         config.output.string(), checkpoint.filename().string());
  if (!checkpoint.empty()) return;
  for (const char* name : {"README.md", "selector.json", "selector.safetensors"})
    if (fs::exists(config.output / name))
      fail("{} holds a {} that is of no run of its own and would be replaced; choose another output folder",
           config.output.string(), name);
}

TrainResult distill(const Backbone& backbone, Selector& selector, const Tokenizer& tokenizer,
                    const TrainConfig& config, bool resume, const TrainHooks& hooks) {
  const Encode encode = [&](const std::string& text) { return tokenizer.encode(text); };
  return distill(backbone, selector, encode, document_end(tokenizer), config, resume, hooks);
}

int32_t document_end(const Tokenizer& tokenizer) {
  for (const char* name : {"<|endoftext|>", "<|end_of_text|>", "</s>"})
    if (const auto id = tokenizer.token_id(name)) return *id;
  if (tokenizer.eos_ids().empty())
    fail("the tokenizer names no end-of-text token, which training sequences need between documents");
  return tokenizer.eos_ids().front();
}

}  // namespace spot
