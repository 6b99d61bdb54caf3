"""tidy.py [DIRECTORY...]: clang-tidy over the C++ files of the build in build/lint, or of these directories only, as many
at a time as there are processors.

What clang-tidy costs is reading headers, so it reads the files of a target together, as a unity build does: findings in
an included .cc file are reported like those in a header, if HeaderFilterRegex names it. misc-unused-using-decls would
look at nothing but the main file; unused_using() below stands in for it.

A unit that passed is not looked at again until something that it includes, or .clang-tidy, changes: the files it read are
remembered with their checksums."""
import concurrent.futures
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

BUILD = "build/lint"
STATE = BUILD + "/passed.json"


def checksum(path, known={}):
    if path not in known:
        try:
            with open(path, "rb") as file:
                known[path] = hashlib.sha256(file.read()).hexdigest()
        except OSError:
            known[path] = "missing"
    return known[path]


def includes(entry):
    """Files of the repository that a translation unit reads, generated ones too."""
    command = shlex.split(entry["command"])
    while command and not os.path.basename(command[0]).startswith("clang"):
        command.pop(0)
    keep = []
    skip = False
    for word in command:
        if skip:
            skip = False
        elif word in ("-o", "-c"):
            skip = word == "-o"
        else:
            keep.append(word)
    out = subprocess.run(keep + ["-MM", "-w"], capture_output=True, text=True, cwd=entry["directory"])
    words = out.stdout.replace("\\\n", " ").split()[1:]
    return sorted({os.path.normpath(os.path.join(entry["directory"], word)) for word in words})


def members(name):
    """Source files that a unit is, or includes."""
    if "/Unity/" not in name:
        return [name]
    with open(name) as file:
        return re.findall(r'^#include "(.*)"', file.read(), re.M)


def unused_using(path):
    """Using-declarations of namespace scope whose name does not occur again in the file."""
    with open(path) as file:
        text = file.read()
    for match in re.finditer(r"^using (?:\w*::)+(\w+);", text, re.M):
        if len(re.findall(rf"\b{match[1]}\b", text)) == 1:
            yield f"{path}: using-declaration of {match[1]} is unused"


def passed_before(name, state):
    before = state.get(name)
    return bool(before) and all(checksum(path) == digest for path, digest in before.items())


def look(entry):
    result = subprocess.run(["clang-tidy", "--quiet", "-p", BUILD, entry["file"]], capture_output=True, text=True)
    if result.returncode != 0:
        return entry["file"], None, result.stdout + result.stderr
    read = {path: checksum(path) for path in includes(entry) + [os.path.abspath(".clang-tidy")]}
    return entry["file"], read, ""


def main():
    root = os.getcwd() + "/"
    with open(BUILD + "/compile_commands.json") as file:
        entries = {entry["file"]: entry for entry in json.load(file)}
    # Without generated code, but with the generated files that include a target's sources.
    entries = {name: entry for name, entry in entries.items()
               if name.startswith(root) and ("/Unity/" in name or not name.startswith(root + "build/"))}
    sources = [root + name for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.cc"], capture_output=True, text=True,
        check=True).stdout.split() if os.path.exists(name)]
    # What CMake does not compile (programs of guests) is read by itself.
    for name in set(sources) - {file for name in entries for file in members(name)}:
        entries[name] = {"file": name, "directory": root, "command": f"clang++-14 -std=c++20 -I{root} -c {name}"}
    if len(sys.argv) > 1:
        chosen = tuple(root + name.rstrip("/") + "/" for name in sys.argv[1:])
        sources = [name for name in sources if name.startswith(chosen)]
        # The files of a unit are all of one target, thus of one directory.
        entries = {name: entry for name, entry in entries.items() if members(name)[0].startswith(chosen)}
        if not entries:
            print("clang-tidy: nothing in " + " ".join(sys.argv[1:]))
            return 1
    unused = [line for name in sources for line in unused_using(name)]
    for line in unused:
        print(line, flush=True)
    try:
        with open(STATE) as file:
            state = json.load(file)
    except (OSError, ValueError):
        state = {}
    todo = [entry for name, entry in sorted(entries.items()) if not passed_before(name, state)]
    print(f"clang-tidy: {len(todo)} of {len(entries)} units with {len(sources)} files", flush=True)
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, read, output in pool.map(look, todo):
            if read is None:
                bad += 1
                print(output, flush=True)
            else:
                state[name] = read
    with open(STATE, "w") as file:
        json.dump({name: read for name, read in state.items() if os.path.exists(name)}, file)
    if bad:
        print(f"clang-tidy: {bad} units with findings")
    return 1 if bad or unused else 0


if __name__ == "__main__":
    sys.exit(main())
