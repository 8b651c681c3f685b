// metrics.jsonl and the plots made of it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

namespace spot {

// The metrics of a run, one JSON object a step, in memory and as lines of a file.
class MetricsLog {
 public:
  // Keeps the file's lines up to `last_step` and drops the rest (steps after the checkpoint that is
  // continued); 0 starts an empty file.
  MetricsLog(const std::filesystem::path& path, int64_t last_step);
  // Appends one line. What cannot be written (a full disk) is said on standard error once, kept, and written with a later
  // line; the file never ends in half a line.
  void add(const nlohmann::json& metrics);
  // Writes what add() has kept. Throws Error when it cannot be written.
  void flush();
  const std::vector<nlohmann::json>& entries() const { return entries_; }

 private:
  std::filesystem::path path_;
  std::vector<nlohmann::json> entries_;
  std::string pending_;  // lines that are not in the file yet
  bool failing_ = false;
};

// A self-contained page: loss, captured mass and calibration, over the steps and by layer; learning rate and
// speed; the layers' last values.
void write_loss_page(const std::filesystem::path& path, const std::vector<nlohmann::json>& entries);

}  // namespace spot
