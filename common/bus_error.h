// What the mappings that bear SIGBUS share: there is one handler in a process.
#pragma once

#include <cstdint>

namespace baton {

// Once; later calls only say whether that worked. In fragile_mapping.cc.
bool InstallBusErrorHandler();

// From the handler: true if `address` is in a GuardedMapping, and can be accessed now.
bool BearGuardedFault(uintptr_t address);

}  // namespace baton
