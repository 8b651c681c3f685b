// The finished prompts of an evaluation, one JSON object a line, so that an interrupted run goes on where it
// stopped.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <vector>

namespace spot {

// FILE.jsonl begins with {"settings_hash": ..., "settings": {...}}; each further line is one entry. While a
// log is open no other process can open it.
class RulerLog {
 public:
  // Opens `file`, or creates it and its folder. A last line that was not written whole is dropped. Throws
  // Error when the file was made with other settings (naming those that differ), is damaged, or is in use.
  RulerLog(const std::filesystem::path& file, const nlohmann::json& settings);
  ~RulerLog();
  RulerLog(const RulerLog&) = delete;
  RulerLog& operator=(const RulerLog&) = delete;

  // What the file held when it was opened.
  const std::vector<nlohmann::json>& entries() const { return entries_; }
  // Appends one line and flushes it to disk. Throws Error when that fails; the file then ends as it did
  // before.
  void append(const nlohmann::json& entry);

 private:
  void write(const std::string& line);

  std::filesystem::path file_;
  int descriptor_ = -1;
  std::vector<nlohmann::json> entries_;
};

}  // namespace spot
