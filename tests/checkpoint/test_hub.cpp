#include <array>
#include <cstdlib>
#include <map>
#include <optional>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "checkpoint/hub.h"
#include "core/files.h"
#include "tests/checkpoint/support.h"

namespace spot {
namespace {

namespace fs = std::filesystem;
using testing::expect_error;
using testing::TemporaryFolder;

// The environment of one test; every variable that names a cache is unset before and restored after.
using Variables = std::map<std::string, std::string>;
class Environment {
 public:
  explicit Environment(const Variables& values) {
    for (const char* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"}) {
      const char* before = std::getenv(name);
      before_[name] = before ? std::optional<std::string>(before) : std::nullopt;
      ::unsetenv(name);
    }
    for (const auto& [name, value] : values) ::setenv(name.c_str(), value.c_str(), 1);
  }
  ~Environment() {
    for (const auto& [name, value] : before_)
      value ? ::setenv(name.c_str(), value->c_str(), 1) : ::unsetenv(name.c_str());
  }

 private:
  std::map<std::string, std::optional<std::string>> before_;
};

// A repository as huggingface_hub lays it out: blobs, a snapshot of links to them, a reference.
fs::path make_snapshot(const fs::path& cache, const std::string& name, const std::string& revision) {
  const fs::path repository = cache / ("models--" + name), snapshot = repository / "snapshots" / revision;
  make_folder(repository / "blobs");
  make_folder(repository / "refs");
  make_folder(snapshot);
  write_file_atomically(repository / "blobs" / "abc", "{}");
  fs::create_symlink("../../blobs/abc", snapshot / "config.json");
  write_file_atomically(repository / "refs" / "main", revision);
  return snapshot;
}

TEST(Hub, EveryVariableThatNamesTheCache) {
  TemporaryFolder folder;
  const std::string root = folder.path().string();
  for (const auto& [variable, value, cache] :
       std::vector<std::array<std::string, 3>>{{"HF_HUB_CACHE", root + "/a", root + "/a"},
                                               {"HUGGINGFACE_HUB_CACHE", root + "/b", root + "/b"},
                                               {"HF_HOME", root + "/c", root + "/c/hub"},
                                               {"XDG_CACHE_HOME", root + "/d", root + "/d/huggingface/hub"},
                                               {"HOME", root + "/e", root + "/e/.cache/huggingface/hub"}}) {
    const fs::path snapshot = make_snapshot(cache, "Some-Org--a_model.v2", "0123abcd");
    const Environment environment(Variables{{variable, value}});
    EXPECT_EQ(find_checkpoint("Some-Org/a_model.v2"), snapshot) << variable;
    EXPECT_TRUE(fs::exists(find_checkpoint("Some-Org/a_model.v2") / "config.json"));
  }
  const Environment environment(Variables{{"HF_HUB_CACHE", "~/b"}, {"HF_HOME", root + "/c"}, {"HOME", root}});
  EXPECT_EQ(find_checkpoint("Some-Org/a_model.v2"),
            root + "/b/models--Some-Org--a_model.v2/snapshots/0123abcd");
}

TEST(Hub, MainIsTheSnapshotThatCounts) {
  TemporaryFolder folder;
  const Environment environment(Variables{{"HF_HUB_CACHE", folder.path().string()}});
  make_snapshot(folder.path(), "o--m", "old");
  const fs::path newer = make_snapshot(folder.path(), "o--m", "new");
  EXPECT_EQ(find_checkpoint("o/m"), newer);
  const fs::path repository = folder / "models--o--m";
  write_file_atomically(repository / "refs" / "main", "new\n");
  EXPECT_EQ(find_checkpoint("o/m"), newer);
  write_file_atomically(repository / "refs" / "main", "../../x");
  expect_error([] { find_checkpoint("o/m"); }, {"refs/main", "no revision"});
  write_file_atomically(repository / "refs" / "main", "gone");
  expect_error([] { find_checkpoint("o/m"); }, {"o/m", "in part", "config.json", "hf download o/m"});
  fs::remove(repository / "refs" / "main");
  expect_error([] { find_checkpoint("o/m"); }, {"o/m", "in part", "refs/main"});
  remove_folder(repository / "snapshots" / "old");
  EXPECT_EQ(find_checkpoint("o/m"), newer);
  fs::remove(repository / "blobs" / "abc");  // the link leads nowhere
  expect_error([] { find_checkpoint("o/m"); }, {"o/m", "in part", "config.json"});
}

TEST(Hub, PathsGoFirstAndFilesAreRefused) {
  TemporaryFolder folder;
  const Environment environment(Variables{{"HF_HUB_CACHE", (folder / "cache").string()}});
  make_folder(folder / "model");
  EXPECT_EQ(find_checkpoint((folder / "model").string()), folder / "model");
  for (const char* name : {"model.safetensors", "config.json"}) {
    write_file_atomically(folder / "model" / name, "{}");
    expect_error([&] { find_checkpoint((folder / "model" / name).string()); },
                 {name, "is a file", "give " + (folder / "model").string()});
  }
  write_file_atomically(folder / "x.gguf", "GGUF");
  expect_error([&] { find_checkpoint((folder / "x.gguf").string()); }, {"x.gguf", "tools/convert_gguf.py"});
  expect_error([] { find_checkpoint("Qwen/Qwen3-8B"); },
               {"Qwen/Qwen3-8B", "no such folder", folder.path().string(), "hf download Qwen/Qwen3-8B"});
  for (const char* path : {"nowhere", "/no/where", "a/b/c", "../x", "a/", "/a", "a b/c", ""})
    expect_error([&] { find_checkpoint(path); }, {"no such folder"});
}

TEST(Hub, PointersAndOtherFormsOfWeightsAreNamed) {
  const std::string pointer =
      "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
      "size 12345\n";
  TemporaryFolder folder;
  expect_error([&] { Checkpoint{folder.path()}; }, {"neither model.safetensors"});
  write_file_atomically(folder / "pytorch_model.bin", "PK");
  expect_error([&] { Checkpoint{folder.path()}; }, {"pytorch_model.bin", "safetensors"});
  fs::rename(folder / "pytorch_model.bin", folder / "m.gguf");
  expect_error([&] { Checkpoint{folder.path()}; }, {"m.gguf", "convert_gguf.py"});
  write_file_atomically(folder / "model.safetensors", pointer);
  expect_error([&] { Checkpoint{folder.path()}; }, {"model.safetensors", "Git LFS pointer", "git lfs pull"});
  write_file_atomically(folder / "config.json", pointer);
  expect_error([&] { ModelConfig::load(folder.path()); }, {"config.json", "Git LFS pointer"});
  for (const char* name : {"model.safetensors", "config.json"}) {
    fs::remove(folder / name);
    fs::create_symlink("nowhere", folder / name);
  }
  expect_error([&] { Checkpoint{folder.path()}; }, {"model.safetensors", "link", "not there"});
  expect_error([&] { ModelConfig::load(folder.path()); }, {"config.json", "link", "not there"});
}

}  // namespace
}  // namespace spot
