// Runs batonctl (or another program) as its users do: with pipes or on a terminal.
#pragma once

#include <sys/types.h>
#include <termios.h>

#include <map>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/fd.h"

namespace baton::testing {

// A running batonctl. Killed and reaped when it dies. One thread.
class CtlProcess {
 public:
  struct Options {
    // Another program than batonctl.
    std::string program;
    // On a terminal of this width (standard input, output and error), or with pipes.
    bool terminal = false;
    int columns = 80;
    int rows = 24;
    std::map<std::string, std::string> environment;
    // Standard input of a piped one is closed at once unless it is written to.
    bool keep_input = false;
  };
  CtlProcess(const std::vector<std::string>& arguments, const Options& options);
  ~CtlProcess();
  CtlProcess(const CtlProcess&) = delete;
  CtlProcess& operator=(const CtlProcess&) = delete;

  // Reads until the output (or error output) contains `text`; false after two minutes or at its end.
  bool ReadUntil(const std::string& text);
  bool ReadErrorUntil(const std::string& text);
  void Write(const std::string& text);
  void CloseInput() { input_.reset(); }
  void Signal(int signal);
  // Exit status, 128 + n for signals, -1 if it did not end within two minutes (it is killed then).
  int Wait();

  // Everything read so far.
  const std::string& out() const { return out_; }
  const std::string& err() const { return err_; }
  // The terminal's mode now.
  termios Mode() const;
  void Resize(int columns, int rows);

 private:
  bool Pump(Deadline deadline);
  pid_t pid_ = -1;
  int status_ = -1;
  UniqueFd input_, output_, error_;
  std::string out_, err_;
};

struct CtlResult {
  int code = -1;
  std::string out;
  std::string err;
};
// Runs it to its end, with `input` on standard input.
CtlResult RunCtl(const std::vector<std::string>& arguments, const std::string& input = "",
                 const std::map<std::string, std::string>& environment = {});

}  // namespace baton::testing
