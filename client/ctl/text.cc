#include "client/ctl/text.h"

#include <cstdlib>
#include <sstream>

namespace baton::client {
namespace {

// Length of the escape sequence "ESC [ … letter" at `at`, or 0.
size_t EscapeLength(const std::string& text, size_t at) {
  if (text[at] != '\x1b' || at + 1 >= text.size() || text[at + 1] != '[') return 0;
  size_t end = at + 2;
  while (end < text.size() && (text[end] < '@' || text[end] > '~')) ++end;
  return end < text.size() ? end + 1 - at : 0;
}

// Length of the UTF-8 character at `at`; 1 for invalid bytes.
size_t CharacterLength(const std::string& text, size_t at) {
  auto byte = static_cast<unsigned char>(text[at]);
  size_t length = byte < 0x80 ? 1 : byte >= 0xf0 && byte < 0xf8 ? 4 : byte >= 0xe0 ? 3 : byte >= 0xc2 ? 2 : 1;
  if (byte >= 0xf8) length = 1;
  if (at + length > text.size()) return 1;
  for (size_t i = 1; i < length; ++i) {
    if ((static_cast<unsigned char>(text[at + i]) & 0xc0) != 0x80) return 1;
  }
  return length;
}

}  // namespace

size_t DisplayWidth(const std::string& text) {
  size_t width = 0;
  for (size_t at = 0; at < text.size();) {
    if (size_t escape = EscapeLength(text, at)) {
      at += escape;
      continue;
    }
    at += CharacterLength(text, at);
    ++width;
  }
  return width;
}

std::string Truncate(const std::string& text, size_t width, bool ascii) {
  if (DisplayWidth(text) <= width) return text;
  if (width == 0) return "";
  std::string out;
  size_t used = 0;
  bool coloured = false;
  for (size_t at = 0; at < text.size() && used + 1 < width;) {
    if (size_t escape = EscapeLength(text, at)) {
      out += text.substr(at, escape);
      at += escape;
      coloured = true;
      continue;
    }
    size_t length = CharacterLength(text, at);
    out += text.substr(at, length);
    at += length;
    ++used;
  }
  out += ascii ? "~" : "…";
  if (coloured) out += "\x1b[0m";
  return out;
}

std::string PadRight(const std::string& text, size_t width) {
  size_t have = DisplayWidth(text);
  return have < width ? text + std::string(width - have, ' ') : text;
}

std::string PadLeft(const std::string& text, size_t width) {
  size_t have = DisplayWidth(text);
  return have < width ? std::string(width - have, ' ') + text : text;
}

std::string Harmless(const std::string& text) {
  std::string out = text;
  for (size_t i = 0; i < out.size(); ++i) {
    auto byte = static_cast<unsigned char>(out[i]);
    if ((byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7f) out[i] = '?';
    // C1 controls (U+0080 to U+009F) are escape sequences too, for some terminals.
    if (byte == 0xc2 && i + 1 < out.size() && static_cast<unsigned char>(out[i + 1]) < 0xa0) {
      out[i] = '?';
      out[i + 1] = '?';
    }
  }
  return out;
}

std::string Wrap(const std::string& text, size_t width, size_t indent) {
  std::string out;
  size_t column = 0;
  std::istringstream words(text);
  std::string word;
  while (words >> word) {
    size_t length = DisplayWidth(word);
    if (column > 0 && width > 0 && column + 1 + length > width) {
      out += "\n" + std::string(indent, ' ');
      column = 0;
    } else if (column > 0) {
      out += ' ';
      ++column;
    }
    out += word;
    column += length;
  }
  return out;
}

bool LocaleIsUtf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* value = std::getenv(name);
    if (value == nullptr || *value == '\0') continue;
    std::string locale = value;
    return locale.find("UTF-8") != std::string::npos || locale.find("utf8") != std::string::npos ||
           locale.find("UTF8") != std::string::npos || locale.find("utf-8") != std::string::npos;
  }
  return false;
}

}  // namespace baton::client
