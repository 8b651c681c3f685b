// What a process tells its user on standard error: progress bars, unless it is to be silent.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace spot {

// After silence() this process draws no bars and gives no notices: of the processes of one distributed run only the
// first talks. Errors are no notices.
void silence();
bool is_silent();

// Draws "label [####    ] 12/40 30% note, 0:12 elapsed, 0:28 left" on standard error. On a terminal it redraws one
// line at most ten times a second; elsewhere it prints a plain line at most every ten seconds. Nothing is drawn
// before the first half second, so short work stays silent.
class Progress {
 public:
  Progress(std::string label, int64_t total);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Sets the amount done (same unit as total) and a free note such as "loss 1.23, 4100 tokens/s".
  void update(int64_t done, const std::string& note = "");
  // Starts counting from `done`: work finished before this run does not enter the ETA.
  void start_from(int64_t done);
  double seconds() const;

 private:
  void draw(bool final);

  std::string label_, note_;
  int64_t total_, done_ = 0, base_ = 0;
  bool terminal_, drawn_ = false;
  std::chrono::steady_clock::time_point start_, last_;
};

}  // namespace spot
