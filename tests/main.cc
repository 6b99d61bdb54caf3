// main() of every GoogleTest program.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>

int main(int argc, char** argv) {
  // As in the main() of all of Baton's programs: a peer that is gone is an error with a text, not the end of
  // the process. libvirt's client depends on it, it writes to its daemon's socket without MSG_NOSIGNAL.
  ::signal(SIGPIPE, SIG_IGN);
  testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
