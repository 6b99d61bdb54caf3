// Shell completion: the shell asks batonctl itself, so that commands, options and names are always the
// present ones.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "client/lib/names.h"

namespace CLI {
class App;
}

namespace baton::client {

class Context;

// Names of a collection that exist now, short; nothing on errors.
using NameSource = std::function<std::vector<std::string>(Collection)>;

// What may stand for the last of `words` (the command line after "batonctl"; the last one may be empty or
// incomplete).
std::vector<std::string> Complete(CLI::App& app, const std::vector<std::string>& words,
                                  const NameSource& names);

// `batonctl __complete WORDS…`: prints the candidates, one a line. Never fails and never takes long.
int RunComplete(CLI::App& app, Context* context, const std::vector<std::string>& words);

}  // namespace baton::client
