// OpenSSL's error queue as text. Internal to the stream.
#pragma once

#include <string>

namespace baton::stream {

// Empties this thread's error queue; the reasons, oldest first.
std::string TakeTlsErrors();

}  // namespace baton::stream
