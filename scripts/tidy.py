"""tidy.py [DIRECTORY...]: clang-tidy over the C++ files of the build in build/lint, or of these directories only, as many
at a time as there are processors.

What clang-tidy costs is reading headers, so it reads the files of a target together, as a unity build does: findings in
an included .cc file are reported like those in a header, if HeaderFilterRegex names it. misc-unused-using-decls would
look at nothing but the main file; unused_using() below stands in for it.

A unit that passed is not looked at again until something that it includes, its compiler's arguments or .clang-tidy change:
the files it read are remembered with their checksums. They are remembered beside what ccache does, so that another
checkout, like that of CI, knows of them too."""
import concurrent.futures
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

BUILD = "build/lint"
ROOT = os.getcwd() + "/"
# Of so many states of a unit it is remembered that they passed: branches take turns.
STATES = 8


def checksum(path, known={}):
    if path not in known:
        try:
            with open(path, "rb") as file:
                # Unity files have the names of what they include in full.
                known[path] = hashlib.sha256(file.read().replace(ROOT.encode(), b"")).hexdigest()
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


def relative(path):
    return path.removeprefix(ROOT)


def state_file():
    try:
        directory = subprocess.run(["ccache", "-k", "cache_dir"], capture_output=True, text=True).stdout.strip()
    except OSError:
        directory = ""
    return (directory if os.path.isdir(directory) else BUILD) + "/baton-tidy.json"


def load(path):
    """What has passed: unit -> list of {file: checksum}, the last one last."""
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def save(path, passed):
    """Adds `passed` (unit -> {file: checksum}) to what is there now: another checkout may have written, too."""
    state = load(path)
    for name, read in passed.items():
        before = [other for other in state.get(name, []) if other != read]
        state[name] = (before + [read])[-STATES:]
    with open(f"{path}.{os.getpid()}", "w") as file:
        json.dump(state, file)
    os.replace(file.name, path)


def arguments(entry):
    """A checksum of how a unit is compiled, wherever the checkout is."""
    return hashlib.sha256(entry["command"].replace(ROOT[:-1], "").encode()).hexdigest()


def passed_before(entry, state):
    return any(read.get("arguments") == arguments(entry) and
               all(name == "arguments" or checksum(name) == digest for name, digest in read.items())
               for read in state.get(relative(entry["file"]), []))


def look(entry):
    # Before it looks: what is edited meanwhile has not passed.
    read = {relative(path): checksum(relative(path)) for path in includes(entry) + [".clang-tidy"]}
    result = subprocess.run(["clang-tidy", "--quiet", "-p", BUILD, entry["file"]], capture_output=True, text=True)
    if result.returncode != 0:
        return entry["file"], None, result.stdout + result.stderr
    return entry["file"], read | {"arguments": arguments(entry)}, ""


def main():
    with open(BUILD + "/compile_commands.json") as file:
        entries = {entry["file"]: entry for entry in json.load(file)}
    # Without generated code, but with the generated files that include a target's sources.
    entries = {name: entry for name, entry in entries.items()
               if name.startswith(ROOT) and ("/Unity/" in name or not name.startswith(ROOT + "build/"))}
    sources = [ROOT + name for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.cc"], capture_output=True, text=True,
        check=True).stdout.split() if os.path.exists(name)]
    # What CMake does not compile (programs of guests) is read by itself.
    for name in set(sources) - {file for name in entries for file in members(name)}:
        entries[name] = {"file": name, "directory": ROOT, "command": f"clang++-14 -std=c++20 -I{ROOT} -c {name}"}
    # It takes no time: everywhere, whatever was chosen.
    unused = [line for name in sources for line in unused_using(name)]
    if len(sys.argv) > 1:
        chosen = tuple(ROOT + name.rstrip("/") + "/" for name in sys.argv[1:])
        sources = [name for name in sources if name.startswith(chosen)]
        # The files of a unit are all of one target, thus of one directory.
        entries = {name: entry for name, entry in entries.items() if members(name)[0].startswith(chosen)}
        if not entries:
            print("clang-tidy: nothing in " + " ".join(sys.argv[1:]))
            return 1
    for line in unused:
        print(line, flush=True)
    known = state_file()
    state = load(known)
    todo = [entry for name, entry in sorted(entries.items()) if not passed_before(entry, state)]
    print(f"clang-tidy: {len(todo)} of {len(entries)} units with {len(sources)} files", flush=True)
    bad = 0
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, read, output in pool.map(look, todo):
            if read is None:
                bad += 1
                print(output, flush=True)
            else:
                save(known, {relative(name): read})
    if bad:
        print(f"clang-tidy: {bad} units with findings")
    return 1 if bad or unused else 0


if __name__ == "__main__":
    sys.exit(main())
