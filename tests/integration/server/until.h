// Waiting for what no event tells a test of.
#pragma once

#include <chrono>
#include <thread>

#include "common/clock.h"

namespace baton::test {

// Asks again and again until `holds()`; false when it does not within a minute.
template <typename Condition>
bool Until(const Condition& holds) {
  const Deadline deadline = Deadline::After(std::chrono::minutes(1));
  while (!holds()) {
    if (deadline.Expired()) return false;
    std::this_thread::yield();
  }
  return true;
}

}  // namespace baton::test
