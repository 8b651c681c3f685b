#include "model/quantize.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <set>
#include <utility>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "core/error.h"
#include "core/files.h"
#include "core/new_folder.h"
#include "core/progress.h"
#include "model/weights.h"

namespace spot {
namespace {

namespace fs = std::filesystem;
using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

struct Stopped {};

constexpr int64_t kBlock = 128;
constexpr const char* kConfig = "config.json";

struct Item {
  std::string name;
  bool quantized;
  uint64_t bytes;  // as written
};

// A matrix of a layer, but not those of a row a head.
bool is_quantized(const TensorSpec& spec) {
  return spec.shape.size() == 2 && spec.name.starts_with("layers.") &&
         !spec.name.ends_with(".in_proj_a.weight") && !spec.name.ends_with(".in_proj_b.weight");
}

uint64_t numbers(const std::vector<int64_t>& shape) {
  return static_cast<uint64_t>(c10::multiply_integers(shape));
}

uint64_t scale_numbers(const std::vector<int64_t>& shape) {
  return static_cast<uint64_t>((shape[0] + kBlock - 1) / kBlock * ((shape[1] + kBlock - 1) / kBlock));
}

uint64_t stored_bytes(const Checkpoint& checkpoint, const std::string& name) {
  return numbers(checkpoint.shape(name)) * c10::elementSize(checkpoint.dtype(name));
}

// All tensors, file by file, by name within a file.
std::vector<Item> list_items(const Checkpoint& checkpoint, const ModelConfig& config) {
  const CheckedTensors found = check_tensors(checkpoint, config);
  std::set<std::string> quantized;
  for (const TensorSpec& spec : tensor_specs(config))
    if (is_quantized(spec)) quantized.insert(found.full_name(spec.name));
  std::vector<Item> items;
  for (const std::string& name : checkpoint.names()) {
    const bool codes = quantized.contains(name);
    if (codes &&
        (!at::isFloatingType(checkpoint.dtype(name)) || c10::elementSize(checkpoint.dtype(name)) == 1))
      fail("{}: tensor {} is of {}; a checkpoint in bfloat16, float16 or float32 can be quantised",
           checkpoint.where(name), name, c10::toString(checkpoint.dtype(name)));
    const std::vector<int64_t> shape = checkpoint.shape(name);
    items.push_back(
        {name, codes,
         codes ? numbers(shape) + scale_numbers(shape) * sizeof(float) : stored_bytes(checkpoint, name)});
  }
  std::stable_sort(items.begin(), items.end(), [&](const Item& a, const Item& b) {
    return checkpoint.where(a.name) < checkpoint.where(b.name);
  });
  return items;
}

std::vector<std::vector<Item>> make_shards(const std::vector<Item>& items, uint64_t shard_bytes) {
  std::vector<std::vector<Item>> shards;
  uint64_t bytes = 0;
  for (const Item& item : items) {
    if (shards.empty() || bytes + item.bytes > shard_bytes) {
      shards.emplace_back();
      bytes = 0;
    }
    shards.back().push_back(item);
    bytes += item.bytes;
  }
  return shards;
}

// |new - old| / |old|, a row of blocks at a time: the float32 matrix would be four times the codes.
double change(const at::Tensor& matrix, const Fp8Blocks& blocks) {
  double difference = 0, length = 0;
  for (int64_t i = 0; i < blocks.scales.size(0); ++i) {
    const int64_t rows = std::min(kBlock, matrix.size(0) - i * kBlock);
    const at::Tensor wide = matrix.narrow(0, i * kBlock, rows).to(at::kFloat);
    const at::Tensor factors =
        blocks.scales.select(0, i).repeat_interleave(kBlock).narrow(0, 0, matrix.size(1));
    const at::Tensor now = blocks.codes.narrow(0, i * kBlock, rows).to(at::kFloat).mul_(factors);
    const double apart = now.sub_(wide).norm(2, at::kDouble).item<double>(),
                 whole = wide.norm(2, at::kDouble).item<double>();
    difference += apart * apart;
    length += whole * whole;
  }
  return length > 0 ? std::sqrt(difference / length) : 0;
}

// config.json with what the loaders of FP8 checkpoints look for. Modules are named in full: vLLM compares whole names,
// transformers takes the start or the end of one.
std::string quantized_config(const fs::path& model, const std::vector<Item>& items) {
  std::set<std::string> kept{"lm_head"};
  for (const Item& item : items)
    if (const size_t dot = item.name.rfind(".weight"); !item.quantized && item.name.ends_with(".weight"))
      kept.insert(item.name.substr(0, dot));
  auto config = nlohmann::ordered_json::parse(read_file(model / kConfig));
  config["quantization_config"] = {{"quant_method", "fp8"},
                                   {"fmt", "e4m3"},
                                   {"activation_scheme", "dynamic"},
                                   {"weight_block_size", {kBlock, kBlock}},
                                   {"modules_to_not_convert", kept}};
  return config.dump(2) + "\n";
}

struct Copy {
  fs::path from, to;  // the second from the folder's top
};

bool is_other_weights(const fs::path& name, bool top) {
  static const std::set<std::string> kForms = {".bin", ".pt",      ".pth", ".gguf",
                                               ".h5",  ".msgpack", ".ot",  ".onnx"};
  return kForms.contains(name.extension().string()) ||
         (top && (name.extension() == ".safetensors" || name.string().ends_with(".index.json")));
}

// The files beside config.json and the weights.
void list_copies(const fs::path& folder, const fs::path& below, std::vector<Copy>& copies) {
  constexpr int kDeepest = 8;  // links may run in a circle
  if (std::distance(below.begin(), below.end()) > kDeepest)
    fail("{}: folders are nested more than {} deep; remove the link that makes them so", folder.string(),
         kDeepest);
  std::vector<fs::path> names;
  std::error_code code;
  for (fs::directory_iterator entry(folder, code), end; !code && entry != end; entry.increment(code))
    names.push_back(entry->path().filename());
  if (code) fail("{}: cannot be read: {}", folder.string(), code.message());
  std::sort(names.begin(), names.end());
  const bool top = below.empty(), in_selectors = !top && *below.begin() == "selectors";
  for (const fs::path& name : names) {
    const fs::path from = folder / name, to = below / name;
    const std::string text = name.string();
    if (text.starts_with(".") || (top && text == kConfig) ||
        (in_selectors && text.starts_with("checkpoint-")))
      continue;
    if (fs::is_directory(from, code)) {
      list_copies(from, to, copies);
    } else if (!is_other_weights(name, top)) {
      if (has_file(from) && fs::is_regular_file(from, code)) copies.push_back({from, to});
    }
  }
}

void copy_file(const fs::path& from, const fs::path& to, const std::string& added) {
  std::ifstream in(from, std::ios::binary);
  if (!in) fail("{}: cannot be opened: {}", from.string(), std::strerror(errno));
  write_file_atomically(to, [&](std::ostream& out) {
    std::vector<char> piece(1 << 20);
    while (in) {
      in.read(piece.data(), static_cast<std::streamsize>(piece.size()));
      out.write(piece.data(), in.gcount());
    }
    if (in.bad()) fail("{}: cannot be read: {}", from.string(), std::strerror(errno));
    out << added;
  });
}

void check_space(const fs::path& folder, uint64_t bytes, const fs::path& out) {
  std::error_code code;
  const fs::space_info space = fs::space(folder, code);
  if (!code && space.available < bytes)
    fail("{}: {:.3g} GB are needed and its disk has {:.3g}; name a folder elsewhere", out.string(),
         static_cast<double>(bytes) / 1e9, static_cast<double>(space.available) / 1e9);
}

std::string shard_name(size_t shard, size_t count) {
  return count == 1 ? "model.safetensors" : fmt::format("model-{:05}-of-{:05}.safetensors", shard + 1, count);
}

class Quantizer {
 public:
  Quantizer(const Checkpoint& checkpoint, std::vector<Item> items, const std::string& label,
            const std::function<bool()>& stop)
      : checkpoint_(checkpoint),
        items_(std::move(items)),
        stop_(stop),
        progress_(label, megabytes(total_bytes())) {}

  QuantizeReport write(const fs::path& folder, uint64_t shard_bytes) {
    const auto shards = make_shards(items_, shard_bytes);
    nlohmann::ordered_json places = nlohmann::ordered_json::object();
    std::map<std::string, std::string> by_name;
    for (size_t i = 0; i < shards.size(); ++i) {
      const std::string file = shard_name(i, shards.size());
      Tensors tensors;
      for (const Item& item : shards[i]) add(item, tensors);
      for (const auto& [name, tensor] : tensors) by_name[name] = file;
      write_safetensors(folder / file, tensors, {{"format", "pt"}}, [&](uint64_t bytes) { step(bytes); });
    }
    if (shards.size() > 1) {
      for (const auto& [name, file] : by_name) places[name] = file;
      const nlohmann::ordered_json index = {{"metadata", {{"total_size", report_.bytes}}},
                                            {"weight_map", places}};
      write_file_atomically(folder / "model.safetensors.index.json", index.dump(2) + "\n");
    }
    report_.shards = static_cast<int64_t>(shards.size());
    return report_;
  }

  void step(uint64_t bytes) {
    if (stop_ && stop_()) throw Stopped();
    done_ += bytes;
    progress_.update(megabytes(done_), "MB");
  }

 private:
  static int64_t megabytes(uint64_t bytes) { return static_cast<int64_t>(bytes / 1'000'000); }

  // Read once, written once.
  uint64_t total_bytes() const {
    uint64_t total = 0;
    for (const Item& item : items_) total += stored_bytes(checkpoint_, item.name) + item.bytes;
    return total;
  }

  void add(const Item& item, Tensors& tensors) {
    const at::Tensor stored = checkpoint_.tensor(item.name);
    if (at::isFloatingType(stored.scalar_type()) && stored.element_size() > 1 && !all_finite(stored))
      fail("{}: tensor {} holds values that are not finite; fetch it again, or train the model anew",
           checkpoint_.where(item.name), item.name);
    if (!item.quantized) {
      tensors.emplace_back(item.name, stored);
    } else {
      const Fp8Blocks blocks = quantize_fp8(stored);
      tensors.emplace_back(item.name, blocks.codes);
      tensors.emplace_back(item.name + "_scale_inv", blocks.scales);
      ++report_.matrices;
      if (const double moved = change(stored, blocks); moved >= report_.largest_change) {
        report_.largest_change = moved;
        report_.most_changed = item.name;
      }
    }
    report_.bytes += item.bytes;
    report_.bytes_before += stored.nbytes();
    step(stored.nbytes());
  }

  const Checkpoint& checkpoint_;
  std::vector<Item> items_;
  const std::function<bool()>& stop_;
  QuantizeReport report_;
  uint64_t done_ = 0;
  Progress progress_;
};

}  // namespace

std::optional<QuantizeReport> quantize_checkpoint(const fs::path& model, const fs::path& given,
                                                  uint64_t shard_bytes, const std::function<bool()>& stop) {
  const ModelConfig config = ModelConfig::load(model);
  if (config.quantization.method != Quantization::Method::none)
    fail("{}: is quantised already; give the checkpoint in bfloat16, float16 or float32 that it was made of",
         model.string());
  std::error_code code;
  const fs::path out = free_folder(given);
  const fs::path source = fs::canonical(model, code);
  if (std::mismatch(source.begin(), source.end(), out.begin(), out.end()).first == source.end())
    fail("{}: lies within the checkpoint {}; name a folder elsewhere", given.string(), model.string());

  const Checkpoint checkpoint(model);
  const std::vector<Item> items = list_items(checkpoint, config);
  std::vector<Copy> copies;
  list_copies(model, {}, copies);
  uint64_t bytes = 0;
  for (const Item& item : items) bytes += item.bytes;
  for (const Copy& copy : copies) bytes += fs::file_size(copy.from, code);

  NewFolder folder(out, "spot quantize");
  check_space(folder.path(), bytes, given);
  try {
    Quantizer quantizer(checkpoint, items, fmt::format("Quantising {}", model.string()), stop);
    const QuantizeReport report = quantizer.write(folder.path(), shard_bytes);
    for (const Copy& copy : copies) {
      quantizer.step(0);
      const fs::path to = folder.path() / copy.to;
      make_folder(to.parent_path());
      const std::string words =
          copy.to != "README.md"
              ? ""
              : fmt::format(
                    "\n## Quantised to FP8\n\nMade by `spot quantize`: {} matrices are E4M3 codes with a scale for each "
                    "block of {} x {}; a matrix moved by at most {:.2g}% of its length.\n",
                    report.matrices, kBlock, kBlock, 100 * report.largest_change);
      copy_file(copy.from, to, words);
    }
    write_file_atomically(folder.path() / kConfig, quantized_config(model, items));
    if (stop && stop()) throw Stopped();
    folder.finish();
    return report;
  } catch (const Stopped&) {
    return std::nullopt;
  }
}

}  // namespace spot
