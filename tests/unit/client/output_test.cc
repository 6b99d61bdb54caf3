#include "client/ctl/output.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include "baton/v1/migrations.pb.h"
#include "client/ctl/report_html.h"

namespace baton::client {
namespace {

using ::testing::HasSubstr;

TEST(Output, JsonKeepsFieldNamesAndDefaults) {
  v1::Migration m;
  m.set_name("migrations/1");
  m.set_revision(7);
  m.mutable_params()->mutable_max_downtime()->set_nanos(300000000);
  std::string json = ToJson(m, true);
  EXPECT_THAT(json, HasSubstr(R"("guest_location":"GUEST_LOCATION_UNSPECIFIED")"));
  EXPECT_THAT(json, HasSubstr(R"("revision":"7")"));
  EXPECT_THAT(json, HasSubstr(R"("max_downtime":"0.300s")"));
  EXPECT_EQ(json.find("end_time"), std::string::npos);
  EXPECT_EQ(json.find("\"bandwidth\""), std::string::npos) << "nobody set one";
}

TEST(Output, Yaml_QuotesWhatWouldBeReadAsSomethingElse) {
  std::string yaml = JsonToYaml(
      R"({"a":"true","b":"12","c":"no","d":"","e":"plain text","f":true,"g":12,"h":[],"i":{},"j":"x: y # z","k":"- l"})");
  YAML::Node node = YAML::Load(yaml);
  for (const char* key : {"a", "b", "c", "d"}) EXPECT_EQ(node[key].Tag(), "!") << key << yaml;
  EXPECT_THAT(yaml, HasSubstr("f: true\n"));
  EXPECT_THAT(yaml, HasSubstr("g: 12\n"));
  EXPECT_EQ(node["j"].as<std::string>(), "x: y # z");
  EXPECT_EQ(node["k"].as<std::string>(), "- l");
  EXPECT_EQ(node["h"].size(), 0u);
  EXPECT_TRUE(node["i"].IsMap());
}

TEST(Report, EscapesEverything) {
  v1::Migration m;
  m.set_name("migrations/1");
  m.set_vm("vms/<b>");
  m.set_message("\"'&<img src=x onerror=alert(1)>");
  auto* finding = m.add_findings();
  finding->set_message("<script>");
  auto* part = m.mutable_progress()->mutable_downtimes()->add_parts();
  part->set_name("</title><script>");
  part->mutable_duration()->set_nanos(5);
  std::string page = RenderReport(m);
  EXPECT_EQ(page.find("<script"), std::string::npos);
  EXPECT_EQ(page.find("<img"), std::string::npos);
  EXPECT_EQ(page.find("<b></"), std::string::npos);
  EXPECT_EQ(page.find("http"), std::string::npos) << "nothing is loaded";
}

TEST(Report, ManyRoundsAndNone) {
  v1::Migration m;
  EXPECT_THAT(RenderReport(m), HasSubstr("</html>"));
  for (uint32_t i = 0; i < 500; ++i) m.mutable_progress()->add_rounds()->set_number(i);
  EXPECT_THAT(RenderReport(m), HasSubstr("<polyline"));
}

}  // namespace
}  // namespace baton::client
