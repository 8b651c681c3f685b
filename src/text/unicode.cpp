#include "text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <vector>

namespace spot {
namespace {

struct Range {
  char32_t first, last;
};

template <size_t n>
bool contains(const Range (&ranges)[n], char32_t code_point) {
  const auto* range = std::upper_bound(std::begin(ranges), std::end(ranges), code_point,
                                       [](char32_t value, const Range& r) { return value < r.first; });
  return range != std::begin(ranges) && code_point <= std::prev(range)->last;
}

// Characters younger than Unicode 9 to which normalization would do something: combining marks, and the
// letters of scripts with canonical compositions (Dives Akuru, Todhri, Tulu-Tigalari, Gurung Khema, Kirat
// Rai).
constexpr Range kYoungerThanUnicode9[] = {
    {0x7FD, 0x7FD},     {0x897, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},     {0xC3C, 0xC3C},
    {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},   {0x1ABF, 0x1AEB},   {0x1DF6, 0x1DFA},
    {0xA82C, 0xA82C},   {0x105C0, 0x105F3}, {0x10D24, 0x10D27}, {0x10D69, 0x10D6D}, {0x10EAB, 0x10EAC},
    {0x10EFA, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x11380, 0x113E2}, {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11943}, {0x119E0, 0x119E0},
    {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D45}, {0x11D97, 0x11D97},
    {0x11F41, 0x11F42}, {0x16100, 0x1613F}, {0x16D40, 0x16D7F}, {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F},
    {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF}, {0x1E5EE, 0x1E5EF}};

// Characters younger than Unicode 9 with a compatibility decomposition.
constexpr Range kYoungerCompatibility[] = {
    {0x32FF, 0x32FF},   {0xA7F1, 0xA7F4},   {0xAB69, 0xAB69},   {0x10781, 0x10785}, {0x10787, 0x107B0},
    {0x107B2, 0x107BA}, {0x1CCD6, 0x1CCF9}, {0x1E030, 0x1E06D}, {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}};

// Letters whose lower case is younger than Unicode 15, or not one letter: {first, last, distance}.
struct LowerCase {
  char32_t first, last;
  int32_t distance;
};
constexpr LowerCase kYoungerLowerCase[] = {{0x1C89, 0x1C89, 1},      {0xA7CB, 0xA7CB, 0x264 - 0xA7CB},
                                           {0xA7CC, 0xA7CC, 1},      {0xA7CE, 0xA7CE, 1},
                                           {0xA7D2, 0xA7D2, 1},      {0xA7D4, 0xA7D4, 1},
                                           {0xA7DA, 0xA7DA, 1},      {0xA7DC, 0xA7DC, 0x19B - 0xA7DC},
                                           {0x10D50, 0x10D65, 0x20}, {0x16EA0, 0x16EB8, 0x1B}};
constexpr char32_t kCapitalIWithDot = 0x130;

// The first code point that NFC may change or move; all below are starters that NFC leaves alone.
constexpr char32_t kFirstCombining = 0x300;
constexpr unsigned char kLeadByteOfFirstCombining = 0xCC;

// The code point before the first trailing Hangul consonant composes with nothing; utf8proc would swallow it.
constexpr char32_t kHangulTrailingBase = 0x11A7;

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// How the bytes at the front of `text` begin: a whole sequence, a part of one that more bytes could complete
// (only where `text` ends), or an ill-formed part. `length` counts the bytes of it.
enum class Form { kComplete, kUnfinished, kIllFormed };
struct Sequence {
  Form form;
  size_t length;
};

Sequence classify(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return {Form::kComplete, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Form::kIllFormed, 1};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  for (size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Form::kUnfinished, i};
    unsigned char lowest = 0x80, highest = 0xBF;
    if (i == 1) {  // the second byte rules out overlong forms, surrogates and values above U+10FFFF
      if (lead == 0xE0) lowest = 0xA0;
      if (lead == 0xED) highest = 0x9F;
      if (lead == 0xF0) lowest = 0x90;
      if (lead == 0xF4) highest = 0x8F;
    }
    if (byte(i) < lowest || byte(i) > highest) return {Form::kIllFormed, i};
  }
  return {Form::kComplete, length};
}

int combining_class(utf8proc_int32_t code_point) {
  return utf8proc_get_property(code_point)->combining_class;
}

// Canonical order, then composition if wanted, of a fully decomposed run. utf8proc would do all three steps
// in one call, but its ordering step takes quadratic time on long runs of marks.
void finish_run(std::vector<utf8proc_int32_t>& run, bool composes, std::string& out) {
  for (size_t i = 0; i < run.size();) {
    if (combining_class(run[i]) == 0) {
      ++i;
      continue;
    }
    size_t end = i;
    while (end < run.size() && combining_class(run[end]) != 0) ++end;
    std::stable_sort(run.begin() + i, run.begin() + end,
                     [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    i = end;
  }
  auto length = static_cast<utf8proc_ssize_t>(run.size());
  if (composes)
    length = utf8proc_normalize_utf32(run.data(), length,
                                      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  for (utf8proc_ssize_t i = 0; i < length; ++i) append_utf8(out, static_cast<char32_t>(run[i]));
  run.clear();
}

}  // namespace

size_t find_invalid_utf8(std::string_view text) {
  for (size_t i = 0; i < text.size();) {
    if (static_cast<unsigned char>(text[i]) < 0x80) {
      ++i;
      continue;
    }
    const Sequence sequence = classify(text.substr(i));
    if (sequence.form != Form::kComplete) return i;
    i += sequence.length;
  }
  return std::string_view::npos;
}

char32_t next_code_point(std::string_view text, size_t& offset) {
  const auto byte = [&](size_t i) {
    return static_cast<char32_t>(static_cast<unsigned char>(text[offset + i]));
  };
  const char32_t lead = byte(0);
  char32_t value;
  if (lead < 0x80) {
    offset += 1;
    return lead;
  }
  if (lead < 0xE0) {
    value = (lead & 0x1F) << 6 | (byte(1) & 0x3F);
    offset += 2;
  } else if (lead < 0xF0) {
    value = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    offset += 3;
  } else {
    value = (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
    offset += 4;
  }
  return value;
}

size_t previous_offset(std::string_view text, size_t offset) {
  do {
    --offset;
  } while (offset > 0 && (static_cast<unsigned char>(text[offset]) & 0xC0) == 0x80);
  return offset;
}

void append_utf8(std::string& out, char32_t code_point) {
  std::array<utf8proc_uint8_t, 4> bytes;
  const auto length = utf8proc_encode_char(static_cast<utf8proc_int32_t>(code_point), bytes.data());
  out.append(reinterpret_cast<const char*>(bytes.data()), static_cast<size_t>(length));
}

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

std::optional<NormalizationForm> normalization_form(std::string_view name) {
  if (name == "NFC") return NormalizationForm::nfc;
  if (name == "NFD") return NormalizationForm::nfd;
  if (name == "NFKC") return NormalizationForm::nfkc;
  if (name == "NFKD") return NormalizationForm::nfkd;
  return std::nullopt;
}

std::string normalize(std::string_view text, NormalizationForm form) {
  const bool composes = form == NormalizationForm::nfc || form == NormalizationForm::nfkc;
  const bool compatible = form == NormalizationForm::nfkc || form == NormalizationForm::nfkd;
  const auto options =
      static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : UTF8PROC_STABLE));
  // Below it nothing changes, unless what follows combines.
  const char32_t first_changed = form == NormalizationForm::nfc ? kFirstCombining : 0x80;
  const auto below_combining = [&](size_t i) {
    return i >= text.size() || static_cast<unsigned char>(text[i]) < kLeadByteOfFirstCombining;
  };
  std::string out;
  out.reserve(text.size());
  std::vector<utf8proc_int32_t> run;
  std::array<utf8proc_int32_t, 32> parts;
  for (size_t i = 0; i < text.size();) {
    const size_t begin = i;
    const char32_t code_point = next_code_point(text, i);
    if (run.empty() && code_point < first_changed && below_combining(i)) {
      out.append(text, begin, i - begin);
      continue;
    }
    if (code_point == kHangulTrailingBase || contains(kYoungerThanUnicode9, code_point) ||
        (compatible && contains(kYoungerCompatibility, code_point))) {
      finish_run(run, composes, out);
      out.append(text, begin, i - begin);
      continue;
    }
    // A starter that nothing can combine with (and U+0300 up may) ends the run before it, which bounds its
    // length.
    if (code_point < kFirstCombining) finish_run(run, composes, out);
    int boundary = 0;
    const auto count =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(code_point), parts.data(),
                                static_cast<utf8proc_ssize_t>(parts.size()), options, &boundary);
    run.insert(run.end(), parts.begin(), parts.begin() + count);
  }
  finish_run(run, composes, out);
  return out;
}

std::string lowercase(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const char32_t c = next_code_point(text, i);
    if (c == kCapitalIWithDot) {
      out += "i\u0307";
      continue;
    }
    const auto* young = std::find_if(std::begin(kYoungerLowerCase), std::end(kYoungerLowerCase),
                                     [c](const LowerCase& l) { return c >= l.first && c <= l.last; });
    append_utf8(out, young != std::end(kYoungerLowerCase)
                         ? static_cast<char32_t>(static_cast<int32_t>(c) + young->distance)
                         : static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))));
  }
  return out;
}

void Utf8Stream::push(std::string_view bytes, std::string& out) {
  std::string joined;
  if (!pending_.empty()) {
    joined = std::move(pending_);
    pending_.clear();
    joined += bytes;
    bytes = joined;
  }
  while (!bytes.empty()) {
    const Sequence sequence = classify(bytes);
    if (sequence.form == Form::kUnfinished) {
      pending_ = bytes;
      return;
    }
    out.append(sequence.form == Form::kComplete ? bytes.substr(0, sequence.length) : kReplacement);
    bytes.remove_prefix(sequence.length);
  }
}

void Utf8Stream::finish(std::string& out) {
  if (!pending_.empty()) out += kReplacement;
  pending_.clear();
}

}  // namespace spot
