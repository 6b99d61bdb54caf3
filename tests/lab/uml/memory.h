// The workload that a guest with a balloon runs: see memory.cc.
#pragma once

// Until it is told to end. Prints RESULT.
void RunMemoryWorkload();
