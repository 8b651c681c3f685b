// Where a checkpoint lies: a folder, or a model's name in the cache that Hugging Face's tools keep.
#pragma once

#include <filesystem>
#include <string>

namespace spot {

// The folder of a checkpoint given as a path, or as ORG/NAME that the local hub cache holds (HF_HUB_CACHE, else
// HF_HOME/hub, else $XDG_CACHE_HOME or ~/.cache/huggingface/hub): its snapshot of the branch main. A folder of
// that name goes first. Throws Error that says what to do instead where there is neither, where a file was given
// and where the cache holds the model only in part. Reads no network.
std::filesystem::path find_checkpoint(const std::string& path_or_name);

}  // namespace spot
