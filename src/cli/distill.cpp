// spot distill: learn a selector for a frozen checkpoint.
#include <fmt/format.h>

#include <cstdlib>
#include <memory>

#include "cli/commands.h"
#include "cli/options.h"
#include "cli/process_group.h"
#include "cli/usage.h"
#include "core/error.h"
#include "core/files.h"
#include "core/folder_lock.h"
#include "core/notice.h"
#include "distill/trainer.h"
#include "text/tokenizer.h"

namespace spot::cli {
namespace {

struct DistillOptions {
  ModelOptions model;
  TrainConfig train;
  std::vector<std::string> length_mix;
  std::string preset = "spot";
  // Selector fields by their names in selector.json; absent ones take the preset's value.
  std::optional<std::string> loss, teacher, teacher_scope, per, key_norm, cache_format, start;
  std::optional<int64_t> key_heads, num_heads, rope_dims, sinks, recency, floor;
  int64_t k_train = 0;
  bool rest_bucket = false, resume = false, no_calibrate = false, shard_backbone = false;
  std::vector<int64_t> dense_layers;
};

SelectorConfig selector_config(const DistillOptions& o) {
  nlohmann::json json = SelectorConfig::from_preset(o.preset).to_json();
  auto set = [&](nlohmann::json& object, const char* field, const auto& value) {
    if (value) object[field] = *value;
  };
  set(json, "per", o.per);
  set(json, "key_norm", o.key_norm);
  set(json, "cache_format", o.cache_format);
  set(json, "key_heads", o.key_heads);
  set(json, "num_heads", o.num_heads);
  set(json, "rope_dims", o.rope_dims);
  auto& distillation = json["distillation"];
  set(distillation, "start", o.start);
  set(distillation, "loss", o.loss);
  set(distillation, "teacher", o.teacher);
  set(distillation, "teacher_scope", o.teacher_scope);
  if (o.rest_bucket) distillation["rest_bucket"] = true;
  // The paper's 8192 is half of its 16384 tokens; the same share holds at other lengths.
  distillation["k_train"] =
      o.k_train > 0 ? o.k_train : std::max<int64_t>(o.train.data.sequence_length / 2, 1);
  auto& selection = json["selection"];
  set(selection, "sinks", o.sinks);
  set(selection, "recency", o.recency);
  set(selection, "floor", o.floor);
  if (!o.dense_layers.empty()) selection["dense_layers"] = o.dense_layers;
  return SelectorConfig::from_json(json, "command line");
}

// "512:0.25" -> {512, 0.25}
LengthShare parse_share(const std::string& word) {
  const size_t colon = word.find(':');
  try {
    if (colon == std::string::npos) return {std::stoll(word), 1.0};
    return {std::stoll(word.substr(0, colon)), std::stod(word.substr(colon + 1))};
  } catch (const std::logic_error&) {
    fail("--length-mix '{}' is not LENGTH or LENGTH:SHARE", word);
  }
}

// Environment variables of torchrun and other launchers.
int64_t launcher_number(const char* name, int64_t absent) {
  const char* text = std::getenv(name);
  return text ? std::atoll(text) : absent;
}

// What the options of a distillation may need (cli/usage.h) and have.
std::set<Need> met_needs(const TrainConfig& train, const SelectorConfig& selector) {
  std::set<Need> met;
  if (selector.distillation.loss == DistillLoss::sparse) met.insert(Need::sparse_loss);
  if (learning_rate(train, train.steps - 1) < train.peak_lr || train.final_lr == train.peak_lr)
    met.insert(Need::falling_rate);
  if (train.data.held_out_every > 0) met.insert(Need::held_out_documents);
  if (train.data.held_out_every > 0 && train.held_out_sequences > 0) {
    met.insert(Need::held_out_sequences);
    if (train.calibrate) met.insert(Need::calibration);
  }
  return met;
}

int run_distill(DistillOptions& options, const CLI::App& command, const ProcessGroup* group) {
  if (const int64_t processes = launcher_number("WORLD_SIZE", 1); !group && processes > 1)
    fail(
        "WORLD_SIZE is {}, but this program cannot join other processes by itself: start tools/distill.py with torchrun instead, "
        "or unset WORLD_SIZE",
        processes);
  TrainHooks hooks;
  if (group) {
    options.model.local_rank = static_cast<int>(launcher_number("LOCAL_RANK", 0));
    hooks.replicas = {group->rank(), group->count(),
                      [group](std::vector<at::Tensor>& tensors) { group->sum(tensors); }};
  }
  Shards shards;
  if (options.shard_backbone) {
    if (!group)
      fail("--shard-backbone spreads the model over several processes; start tools/distill.py with torchrun");
    shards = {group->rank(), group->count(),
              [group](at::Tensor& whole, const at::Tensor& part) { group->gather(whole, part); }};
  }
  const bool talks = hooks.replicas.rank == 0;
  for (const std::string& word : options.length_mix)
    options.train.data.length_mix.push_back(parse_share(word));
  options.train.calibrate = !options.no_calibrate;
  options.train.validate();
  const SelectorConfig config = selector_config(options);
  check_needs(command, met_needs(options.train, config));
  // Everything that is cheap to know comes before the weights.
  const ModelConfig model = options.model.prepare();
  check_distillation(options.train, options.resume, model, config, hooks.replicas, options.shard_backbone);
  const Tokenizer tokenizer = Tokenizer::load(options.model.folder);
  document_end(tokenizer);
  list_text_files(options.train.data.paths, options.train.data.text_field);
  Selector selector(config, model, options.model.resolve_device(), at::kFloat, options.train.data.seed);
  FolderLock lock;
  if (talks) {
    make_folder(options.train.output);
    lock = FolderLock(options.train.output, "spot distill");
    check_distillation(options.train, options.resume, model, config, hooks.replicas, options.shard_backbone);
  }
  const Backbone backbone = options.model.load(shards);
  if (talks) {
    fmt::print("distilling {} layers, {:.2f}M selector parameters, {} steps of {} sequences of {} tokens\n",
               selector.layers().size(), static_cast<double>(selector.num_parameters()) / 1e6,
               options.train.steps, options.train.sequences_per_step, options.train.data.sequence_length);
  }
  const TrainResult result = distill(backbone, selector, tokenizer, options.train, options.resume, hooks);
  const std::string folder = options.train.output.string();
  if (result.status == TrainStatus::interrupted) {
    if (talks)
      notice("interrupted after step {}; saved. Continue with the same command and --resume\n", result.steps);
    return 130;
  }
  if (talks)
    fmt::print("selector: {}\nits card: {}\nloss plot: {}\n", folder,
               (options.train.output / "README.md").string(), (options.train.output / "loss.html").string());
  return 0;
}

}  // namespace

void add_distill(CLI::App& app, const ProcessGroup* group) {
  auto options = std::make_shared<DistillOptions>();
  CLI::App& command = *app.add_subcommand("distill", "Learn a selector for a frozen checkpoint");
  command
      .fallthrough();  // so that --config, which CLI11 reads at the top only, may stand behind the word distill
  options->model.add(command);
  TrainConfig& train = options->train;
  command.add_option("--data", train.data.paths, "Text files, .jsonl, .gz, .zst, or folders of them")
      ->required();
  command.add_option("--out", train.output, "Folder for the selector, metrics and checkpoints")->required();
  command
      .add_option(
          "--store", train.store,
          "Type of the finished selector's projections on disk: float32, bfloat16, int8 (rows with a scale each) or "
          "int4 (groups of 32 with a scale each)")
      ->capture_default_str();
  command.add_flag("--resume", options->resume, "Continue the newest checkpoint in --out");
  command.add_flag(
      "--shard-backbone", options->shard_backbone,
      "Several processes: each holds a part of every layer's weights, for models larger than one GPU");

  const char* shape = "Selector";
  command.add_option("--preset", options->preset, "spot or paper")->capture_default_str()->group(shape);
  command.add_option("--key-heads", options->key_heads, "1: one key shared by the heads; 4: a key per head")
      ->group(shape);
  command.add_option("--num-heads", options->num_heads, "Selector heads")->group(shape);
  command.add_option("--rope-dims", options->rope_dims, "Rotated dims of selector queries and keys")
      ->group(shape);
  command.add_option("--key-norm", options->key_norm, "none, layernorm or rmsnorm")->group(shape);
  command.add_option("--per", options->per, "layer: one block set a layer; kv_group: one per KV head")
      ->group(shape);
  command.add_option("--cache-format", options->cache_format, "f32, bf16, int8, int4, mxfp4 or nvfp4")
      ->group(shape);
  command.add_option("--sinks", options->sinks, "Tokens at the start of the context that are always read")
      ->group(shape);
  command.add_option("--recency", options->recency, "Tokens at its end that are always read")->group(shape);
  command.add_option("--floor", options->floor, "Fewest tokens read; shorter contexts are dense")
      ->group(shape);
  command.add_option("--dense-layers", options->dense_layers, "Layers that stay dense and get no selector")
      ->delimiter(',')
      ->group(shape);

  command
      .add_option("--start", options->start,
                  "First weights: backbone (fitted to its own queries and keys) or random")
      ->group(shape);

  const char* loss = "Loss";
  command
      .add_option("--loss", options->loss,
                  "dense: KL over all keys; sparse: over the student's own top --k-train")
      ->group(loss);
  command.add_option("--k-train", options->k_train, "Tokens of the sparse loss (0: half the length)")
      ->group(loss);
  command.add_option("--teacher", options->teacher, "token or block_max")->group(loss);
  command
      .add_option("--teacher-scope", options->teacher_scope, "all, or residual: without sinks and recency")
      ->group(loss);
  command
      .add_flag("--rest-bucket", options->rest_bucket,
                "Sparse loss with one more outcome for all that is not kept")
      ->group(loss);

  const char* schedule = "Schedule";
  command.add_option("--length", train.data.sequence_length, "Tokens a sequence")
      ->capture_default_str()
      ->group(schedule);
  command.add_option("--length-mix", options->length_mix, "Shorter contexts too: LENGTH:SHARE,...")
      ->delimiter(',')
      ->group(schedule);
  command.add_option("--steps", train.steps, "Optimiser steps")->capture_default_str()->group(schedule);
  command.add_option("--sequences-per-step", train.sequences_per_step, "Sequences a step")
      ->capture_default_str()
      ->group(schedule);
  command
      .add_option("--query-rows", train.query_rows, "Queries of each sequence that enter the loss (0: all)")
      ->capture_default_str()
      ->group(schedule);
  command.add_option("--lr", train.peak_lr, "Peak learning rate")->capture_default_str()->group(schedule);
  command.add_option("--final-lr", train.final_lr, "Learning rate at the end")
      ->capture_default_str()
      ->group(schedule);
  command.add_option("--warmup-steps", train.warmup_steps, "Linear warm-up")
      ->capture_default_str()
      ->group(schedule);
  command.add_option("--constant-share", train.constant_share, "Share of the steps at the peak")
      ->capture_default_str()
      ->group(schedule);
  command.add_option("--weight-decay", train.weight_decay, "AdamW weight decay")
      ->capture_default_str()
      ->group(schedule);
  command.add_option("--clip-norm", train.clip_norm, "Gradient clipping (0: none)")
      ->capture_default_str()
      ->group(schedule);
  command.add_option("--seed", train.data.seed, "Seed of initialisation, data order and query rows")
      ->capture_default_str()
      ->group(schedule);
  command.add_flag("--document-mask", train.document_mask, "Packed documents do not see each other")
      ->group(schedule);

  const char* watch = "Watching";
  command
      .add_option("--held-out-every", train.data.held_out_every, "Every n-th document is held out (0: none)")
      ->capture_default_str()
      ->group(watch);
  command.add_option("--held-out-sequences", train.held_out_sequences, "Sequences of the held-out loss")
      ->capture_default_str()
      ->group(watch);
  command.add_option("--held-out-interval", train.held_out_interval, "Steps between held-out losses")
      ->capture_default_str()
      ->group(watch);
  command.add_option("--checkpoint-interval", train.checkpoint_interval, "Steps between checkpoints")
      ->capture_default_str()
      ->group(watch);
  command
      .add_option("--calibration-length", train.calibration_length,
                  "Tokens of the held-out contexts on which temperatures are fitted (0: --length)")
      ->capture_default_str()
      ->group(watch);
  command.add_flag("--no-calibrate", options->no_calibrate, "Leave the temperatures at 1")->group(watch);
  command.callback([options, &command, group] {
    if (const int status = run_distill(*options, command, group)) throw CLI::RuntimeError(status);
  });
}

}  // namespace spot::cli
