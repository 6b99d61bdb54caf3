# Compiler settings that every target shares, and the three ways a target is made here.
include(GNUInstallDirs)

find_program(CCACHE_PROGRAM ccache)
if(CCACHE_PROGRAM)
  # Precompiled headers carry time stamps; these two are what ccache's manual asks for beside -fpch-preprocess.
  set(baton_launcher ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
      CCACHE_BASEDIR=${CMAKE_SOURCE_DIR} CCACHE_NOHASHDIR=1 ${CCACHE_PROGRAM})
  set(CMAKE_C_COMPILER_LAUNCHER ${baton_launcher})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${baton_launcher})
endif()

add_compile_options(-Wall -Wextra -Werror -fno-omit-frame-pointer -ffile-prefix-map=${CMAKE_SOURCE_DIR}/=)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # GCC 12 warns of code that is in order once it optimises: -Wrestrict of std::string assignments (GCC bug 105651),
  # -Wmaybe-uninitialized of values moved out of absl::StatusOr. clang-tidy and the sanitizers look for the real thing.
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-fpch-preprocess> -Wno-restrict)
  if(BATON_SANITIZE OR NOT CMAKE_BUILD_TYPE STREQUAL "Debug")
    add_compile_options(-Wno-maybe-uninitialized)
  endif()
endif()
if(BATON_SANITIZE)
  add_compile_options(-fsanitize=${BATON_SANITIZE} -fno-sanitize-recover=all)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND BATON_SANITIZE MATCHES "undefined")
    # They take time to compile, for what is mostly seen without them: ASan reports an access through a null pointer,
    # beyond an object's end, or to an object that is gone.
    add_compile_options(-fno-sanitize=null,object-size,vptr)
  endif()
  add_link_options(-fsanitize=${BATON_SANITIZE})
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND BATON_SANITIZE MATCHES "address")
    # As shared libraries the two take each other's functions, and what UBSan reports goes to stderr whatever log_path says.
    add_link_options(-static-libasan -static-libubsan)
  endif()
  # A report of a program that a test starts and kills would be lost with it: they all go to files, and ./dev test fails
  # when there is one.
  set(baton_reports ${CMAKE_BINARY_DIR}/reports)
  file(MAKE_DIRECTORY ${baton_reports})
  # SIGBUS is left to the program: mappings of files that others truncate expect it, and their tests die of it on purpose.
  # For @TEST@: baton_test_environment() below.
  set(baton_sanitizer_options
    ASAN_OPTIONS=log_path=${baton_reports}/@TEST@.asan:detect_stack_use_after_return=1:handle_sigbus=0
    UBSAN_OPTIONS=log_path=${baton_reports}/@TEST@.ubsan:print_stacktrace=1
    LSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/tests/lsan.supp:print_suppressions=0
    # A quarter of the cases of property tests: what sanitizers look for is in each of them.
    RC_PARAMS=max_success=25
    TSAN_OPTIONS=log_path=${baton_reports}/@TEST@.tsan:suppressions=${CMAKE_SOURCE_DIR}/tests/tsan.supp:second_deadlock_stack=1:handle_sigbus=0)
  set(baton_sanitizer asan)
  if(BATON_SANITIZE MATCHES "thread")
    set(baton_sanitizer tsan)
  endif()
  # The tests and what they start: ./dev test asan builds no benchmark, nor programs that only end-to-end tests start. The
  # first is what CI runs.
  add_custom_target(sanitized_ci)
  add_custom_target(sanitized)
  add_dependencies(sanitized sanitized_ci)
endif()
if(BATON_FUZZ)
  # Coverage of everything that a fuzzer calls, not only of its own file.
  add_compile_options(-fsanitize=fuzzer-no-link)
  add_custom_target(fuzzers)
endif()
find_program(LLD_PROGRAM ld.lld)
if(LLD_PROGRAM)
  add_link_options(-fuse-ld=lld)
endif()

# baton_generated_code(NAME): protoc's output as a target. It is not ours to warn about or to step through, and nothing in
# it is hot. A file at a time, because the namespace-scope names of two .pb.cc files collide. No more than the library that
# it calls is it compiled for a sanitizer.
function(baton_generated_code name)
  target_compile_options(${name} PRIVATE -w -g0 $<$<NOT:$<CONFIG:Debug>>:-O1>)
  if(BATON_SANITIZE)
    target_compile_options(${name} PRIVATE -fno-sanitize=all)
  endif()
  set_target_properties(${name} PROPERTIES UNITY_BUILD OFF)
endfunction()

# baton_library(NAME SRCS a.cc ... DEPS lib ...): a room of the source tree as a static library.
function(baton_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SRCS})
  target_include_directories(${name} PUBLIC ${CMAKE_SOURCE_DIR})
  target_link_libraries(${name} PUBLIC ${ARG_DEPS})
endfunction()

# baton_test_environment(TEST): what sanitizers are told in a test. Its reports have its name: they end with the pid of the
# process, and in the namespace of a contained test that is a small number, which a process of another test has, too.
function(baton_test_environment test)
  string(REPLACE "@TEST@" ${test} environment "${baton_sanitizer_options}")
  set_tests_properties(${test} PROPERTIES ENVIRONMENT "${environment}")
endfunction()

# A test of real programs is started by baton-lab-contain: nothing that it started outlives it, however it ends.
set(baton_contain $<TARGET_FILE:baton-lab-contain>)

# baton_test(NAME SRCS a_test.cc ... DEPS lib ... [LABELS unit] [TIMEOUT s]): a GoogleTest binary known to ctest as a
# whole; its cases are counted by gtest, its run by ctest.
#
# In CI unit tests run with sanitizers, too, and integration tests with the label asan or tsan with that one. With the label
# no-asan or no-tsan it is not part of a build with that sanitizer. no-tsan is for what links gRPC: Debian's
# gRPC and absl are not instrumented, and absl::Mutex is a futex of its own, so that ThreadSanitizer takes what they hand
# from one thread to another for a race. What has threads and no gRPC (the shim and everything below it) is looked at.
function(baton_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS;LABELS" ${ARGN})
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(BATON_SANITIZE)
    # Two to ten times slower.
    math(EXPR ARG_TIMEOUT "4 * ${ARG_TIMEOUT}")
  endif()
  add_executable(${name} ${ARG_SRCS})
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} baton_test_main)
  # What is tested is optimised as it is shipped; the tests themselves are not: half of the time of compiling them.
  target_compile_options(${name} PRIVATE -O0)
  if(BATON_SANITIZE)
    if("no-${baton_sanitizer}" IN_LIST ARG_LABELS)
      # Not built for it.
    elseif("unit" IN_LIST ARG_LABELS OR ${baton_sanitizer} IN_LIST ARG_LABELS)
      add_dependencies(sanitized_ci ${name})
    else()
      add_dependencies(sanitized ${name})
    endif()
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND BATON_SANITIZE MATCHES "undefined")
      # A quarter of the time of compiling a test: undefined behaviour is looked for in what it calls.
      target_compile_options(${name} PRIVATE -fno-sanitize=undefined)
    endif()
  endif()
  if("unit" IN_LIST ARG_LABELS)
    add_test(NAME ${name} COMMAND ${name})
  else()
    add_dependencies(${name} baton-lab-contain)
    add_test(NAME ${name} COMMAND ${baton_contain} $<TARGET_FILE:${name}>)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
  baton_test_environment(${name})
endfunction()

# baton_fuzzer(NAME SRCS x_fuzz.cc DEPS lib ... CORPUS dir): with BATON_FUZZ a libFuzzer binary; otherwise the same entry
# point behind a small main that replays the corpus as an ordinary test; not with sanitizers, as the fuzzers themselves are
# built with them and read the corpus first.
function(baton_fuzzer name)
  cmake_parse_arguments(ARG "" "CORPUS" "SRCS;DEPS" ${ARGN})
  if(BATON_SANITIZE AND NOT BATON_FUZZ)
    return()
  endif()
  add_executable(${name} ${ARG_SRCS})
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS})
  if(BATON_FUZZ)
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    add_dependencies(fuzzers ${name})
    add_test(NAME ${name} COMMAND ${name} -max_total_time=20 -timeout=10 -rss_limit_mb=2048 ${CMAKE_BINARY_DIR}/corpus/${name} ${ARG_CORPUS})
    file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/corpus/${name})
    set_tests_properties(${name} PROPERTIES LABELS fuzz TIMEOUT 120)
  else()
    target_sources(${name} PRIVATE ${CMAKE_SOURCE_DIR}/tests/fuzz/replay_main.cc)
    add_test(NAME ${name}_corpus COMMAND ${name} ${ARG_CORPUS})
    set_tests_properties(${name}_corpus PROPERTIES LABELS unit TIMEOUT 60)
    baton_test_environment(${name}_corpus)
  endif()
endfunction()
