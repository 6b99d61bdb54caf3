// Points at which a test may hold a process still, so that "killed in this very moment" can be tested without
// luck. A test hook that is compiled in always and does nothing unless the environment variable
// BATON_PAUSE_AT names the point. With the value "@FILE" the list is read from FILE each time, so that a test
// can change its mind while the process runs.
#pragma once

#include <string>

#include "common/clock.h"

namespace baton {

// If BATON_PAUSE_AT (a comma separated list) holds `name`: logs "pause-point NAME", creates the file
// DIRECTORY/pause-NAME and waits until somebody removes it, at most `bound`. Otherwise returns at once. A
// file that cannot be made is logged and not waited for. Any thread.
void PausePoint(const std::string& directory, const std::string& name,
                Duration bound = std::chrono::seconds(60));

}  // namespace baton
