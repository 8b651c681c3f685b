// README.md of a distilled selector: what it is, for which checkpoint, how it was trained, what its
// probabilities mean.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace spot {

// Markdown made of selector.json as distill() writes it (config, backbone, layers, and the run under "notes")
// and of the run's metrics; what either lacks (held-out losses, a calibration) the card leaves out. `name` is
// the folder's.
std::string selector_card(const std::string& name, const nlohmann::json& selector,
                          const std::vector<nlohmann::json>& metrics);
// A card with its section on captured mass as selector.json has it now: replaced, or added at the end.
std::string with_mass_section(const std::string& card, const nlohmann::json& selector);

}  // namespace spot
