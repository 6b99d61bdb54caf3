#include "common/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

namespace baton {
namespace {

struct Peer {
  std::string listen;
  bool tls = false;
};
struct Example {
  std::string name;
  uint64_t size = 0;
  uint64_t count = 3;
  Duration timeout{};
  Peer peer;
  std::vector<std::string> args;
  std::map<std::string, std::string> env;
  std::map<std::string, std::string> paths;
  int color = 0;
};

absl::StatusOr<Example> Read(const std::string& text) {
  ASSIGN_OR_RETURN(ConfigDocument doc, ConfigDocument::FromText(text, "x.yaml"));
  Example out;
  ConfigReader root = doc.Root();
  root.Text("name", &out.name, kRequired);
  root.Size("size", &out.size);
  root.Uint("count", &out.count, 1, 10);
  root.Time("timeout", &out.timeout);
  root.Map("peer", [&](ConfigReader& peer) {
    peer.Text("listen", &out.peer.listen, kRequired);
    peer.Bool("tls", &out.peer.tls);
  });
  root.TextList("args", &out.args);
  root.TextMap("env", &out.env);
  root.NamedMaps("qemu", [&](const std::string& name, ConfigReader& qemu) {
    qemu.Path("path", &out.paths[name], kRequired);
  });
  root.Choice<int>("color", {{"red", 1}, {"green", 2}}, &out.color);
  RETURN_IF_ERROR(doc.Finish(root));
  return out;
}

std::string Problem(const std::string& text) { return Message(Read(text).status()); }

TEST(Config, ReadsEveryType) {
  auto out = Read(R"(
name: "a b"
size: 256MiB
timeout: 300ms
peer: {listen: "127.0.0.1:1", tls: on}
args: [-cpu, max, 3]
env: {A: 1, B: ""}
qemu:
  default: {path: /usr/bin/qemu}
color: green
)");
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_EQ(out->name, "a b");
  EXPECT_EQ(out->size, 256ull << 20);
  EXPECT_EQ(out->count, 3u);
  EXPECT_EQ(out->timeout, std::chrono::milliseconds(300));
  EXPECT_TRUE(out->peer.tls);
  EXPECT_EQ(out->args, (std::vector<std::string>{"-cpu", "max", "3"}));
  EXPECT_EQ(out->env.at("A"), "1");
  EXPECT_EQ(out->paths.at("default"), "/usr/bin/qemu");
  EXPECT_EQ(out->color, 2);
}

TEST(Config, NamesLineAndField) {
  EXPECT_EQ(Problem("size: 1MiB\n"), "x.yaml:1: the field 'name' is missing");
  EXPECT_EQ(Problem("name: a\nsize: big\n"),
            "x.yaml:2: size: 'big' is not a size; write a number with B, KiB, MiB, GiB or TiB, like 256MiB");
  EXPECT_EQ(Problem("name: a\ncount: 11\n"), "x.yaml:2: count: 11 is outside 1 to 10");
  EXPECT_EQ(Problem("name: a\ncount: 1.5\n"), "x.yaml:2: count: '1.5' is not a whole number");
  EXPECT_EQ(Problem("name: a\npeer:\n  tls: maybe\n  listen: x\n"),
            "x.yaml:3: peer.tls: 'maybe' is neither on nor off");
  EXPECT_EQ(Problem("name: a\npeer:\n  tls: on\n"), "x.yaml:2: peer: the field 'listen' is missing");
  EXPECT_EQ(Problem("name: a\npeer: x\n"), "x.yaml:2: peer: expected a map, found a single value");
  EXPECT_EQ(Problem("name: [a]\n"), "x.yaml:1: name: expected a single value, found a list");
  EXPECT_EQ(Problem("name: a\nargs: x\n"), "x.yaml:2: args: expected a list, found a single value");
  EXPECT_EQ(Problem("name: a\nargs:\n  - a\n  - {b: c}\n"),
            "x.yaml:4: args[1]: expected a single value, found a map");
  EXPECT_EQ(Problem("name: a\nenv:\n  A: [1]\n"), "x.yaml:3: env.A: expected a single value, found a list");
  EXPECT_EQ(Problem("name:\n"), "x.yaml:1: name: has no value; leave the field out or give it one");
  EXPECT_EQ(Problem("name: \"\"\n"), "x.yaml:1: name: is empty");
  EXPECT_EQ(Problem("name: a\nqemu:\n  old:\n    path: bin/qemu\n"),
            "x.yaml:4: qemu.old.path: 'bin/qemu' is not an absolute path");
  EXPECT_EQ(Problem("name: a\nqemu: {old: 1}\n"), "x.yaml:2: qemu.old: expected a map, found a single value");
}

TEST(Config, SuggestsNames) {
  EXPECT_EQ(Problem("nmae: a\nname: b\n"), "x.yaml:1: nmae: unknown field; did you mean 'name'?");
  EXPECT_EQ(Problem("name: a\npeer:\n  lisen: x\n  listen: x\n"),
            "x.yaml:3: peer.lisen: unknown field; did you mean 'listen'?");
  EXPECT_EQ(Problem("name: a\npeer: {listen: x, zzzzzz: 1}\n"),
            "x.yaml:2: peer.zzzzzz: unknown field; known are listen, tls");
  EXPECT_EQ(Problem("name: a\ncolor: gren\n"),
            "x.yaml:2: color: 'gren' is not one of red, green; did you mean 'green'?");
}

TEST(Config, ReportsAllProblemsInFileOrder) {
  EXPECT_EQ(Problem("colour: red\nname: a\ncount: 0\n"),
            "x.yaml:1: colour: unknown field; did you mean 'color'?\nx.yaml:3: count: 0 is outside 1 to 10");
}

TEST(Config, RefusesWhatIsNotOneMap) {
  EXPECT_EQ(Problem(""), "x.yaml:1: the file is empty");
  EXPECT_EQ(Problem("- a\n- b\n"), "x.yaml:1: expected `field: value` lines, found a list");
  EXPECT_EQ(Problem("just text"), "x.yaml:1: expected `field: value` lines, found a single value");
  EXPECT_EQ(Problem("name: a\n---\nname: b\n"), "x.yaml:3: a second document; one a file is read");
  EXPECT_EQ(Problem("name: a\nsize: 1\nname: b\n"), "x.yaml:3: name: given a second time (first on line 1)");
  EXPECT_EQ(Problem("{[a]: b}"), "x.yaml:1: a field's name is not plain text");
  EXPECT_TRUE(Problem("name: [a\n").rfind("x.yaml:2: not YAML: ", 0) == 0) << Problem("name: [a\n");
  EXPECT_TRUE(Problem("name: a\n\tsize: 1\n").rfind("x.yaml:2: not YAML: ", 0) == 0);
  EXPECT_FALSE(Read(std::string("name: \xff\xfe\x00", 9)).ok());
}

TEST(Config, RefusesBombs) {
  std::string deep(5000, '[');
  EXPECT_FALSE(Read("name: " + deep).ok());
  EXPECT_EQ(Problem("name: " + std::string(40, '[') + std::string(40, ']')),
            "x.yaml:1: nested more than 32 deep");
  std::string laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 9; ++i) {
    laughs += fmt::format("a{}: &a{} [", i, i);
    for (int j = 0; j < 10; ++j) laughs += fmt::format("{}*a{}", j ? ", " : "", i - 1);
    laughs += "]\n";
  }
  EXPECT_NE(Problem(laughs).find("more than 100000 values"), std::string::npos);
}

TEST(Config, FilesThatCannotBeRead) {
  EXPECT_EQ(Message(ConfigDocument::FromFile("/nonexistent/a.yaml").status()),
            "/nonexistent/a.yaml: No such file or directory");
  EXPECT_EQ(Message(ConfigDocument::FromFile("/tmp").status()), "/tmp: is a directory");
  char path[] = "/tmp/baton-config-XXXXXX";
  int fd = ::mkstemp(path);
  ASSERT_GE(fd, 0);
  std::string big(2 << 20, '#');
  ASSERT_EQ(::write(fd, big.data(), big.size()), static_cast<ssize_t>(big.size()));
  ::close(fd);
  EXPECT_EQ(Message(ConfigDocument::FromFile(path).status()), std::string(path) + ": larger than 1MiB");
  ::unlink(path);
}

TEST(Config, ValidatorsProblemsGetLines) {
  auto doc = ConfigDocument::FromText("a: 1\ndevices:\n  - name: x\n  - name: y\n    mac: z\n", "x.yaml");
  ASSERT_TRUE(doc.ok());
  doc->AddProblems(
      absl::InvalidArgumentError("devices[1].mac: is wrong\ndevices[0].other: is missing\nb: what"));
  ConfigReader root = doc->Root();
  for (const char* name : {"a", "devices"}) {
    std::string text;
    if (name[0] == 'a') root.Text(name, &text);
  }
  root.MapList("devices", [](ConfigReader& device) {
    std::string text;
    device.Text("name", &text);
    device.Text("mac", &text);
  });
  EXPECT_EQ(Message(doc->Finish(root)),
            "x.yaml:1: b: what\nx.yaml:3: devices[0].other: is missing\nx.yaml:5: devices[1].mac: is wrong");
}

}  // namespace
}  // namespace baton
