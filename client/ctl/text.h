// Text on a terminal: widths, cutting, and strings from elsewhere made harmless. Pure functions.
#pragma once

#include <string>

namespace baton::client {

// Columns that UTF-8 text takes; escape sequences of colour count nothing. Invalid bytes count one each.
size_t DisplayWidth(const std::string& text);

// The text cut to at most `width` columns, with "…" (or "~" in ASCII) at the cut. Colour escapes stay whole;
// a cut text that had any ends with a reset.
std::string Truncate(const std::string& text, size_t width, bool ascii = false);

// Padded with spaces on the right (or left) to `width` columns; never cut.
std::string PadRight(const std::string& text, size_t width);
std::string PadLeft(const std::string& text, size_t width);

// Strings of servers and guests may hold escape sequences that would drive the user's terminal: control
// characters except line break and tab become "?".
std::string Harmless(const std::string& text);

// Breaks lines at spaces so that they fit; continuation lines begin with `indent` spaces.
std::string Wrap(const std::string& text, size_t width, size_t indent);

// Whether the locale of the environment (LC_ALL, LC_CTYPE, LANG) is a UTF-8 one.
bool LocaleIsUtf8();

}  // namespace baton::client
