// baton-uml-run PROGRAM [ARGUMENT...]: runs User-Mode Linux on hosts whose processors have more register
// state than it knows of.
//
// UML keeps the vector registers of its processes in a buffer whose size is fixed when it is built
// (arch/x86/um/os-Linux/registers.c), and gives them back with PTRACE_SETREGSET(NT_X86_XSTATE). Linux takes
// only a whole XSAVE area there (xstateregs_set), and with AMX that is larger than UML's buffer: every
// process of the guest dies at its first instruction. Where PTRACE_GETREGSET fails at its start, UML uses
// PTRACE_GETFPREGS instead: so a seccomp filter lets it fail. That leaves out the upper halves of the AVX
// registers, which the guest's C library is therefore told not to use; the compilers do not by themselves.
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/ptrace.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: baton-uml-run PROGRAM [ARGUMENT...]\n");
    return 2;
  }
  // The low half of the first argument: x86-64 is little endian.
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, arch)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 4),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ptrace, 0, 2),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PTRACE_GETREGSET, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
  };
  const sock_fprog program = {.len = sizeof(filter) / sizeof(filter[0]), .filter = filter};
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    std::fprintf(stderr, "baton-uml-run: no seccomp filter: %s\n", std::strerror(errno));
    return 1;
  }
  // What UML does not know it gives to init as a variable of its environment.
  std::string tunables =
      "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512BW,-AVX512VL,-AVX_Fast_Unaligned_Load";
  std::vector<char*> words(argv + 1, argv + argc);
  words.insert(words.end(), {tunables.data(), nullptr});
  ::execvp(words[0], words.data());
  std::fprintf(stderr, "baton-uml-run: %s: %s\n", argv[1], std::strerror(errno));
  return 127;
}
