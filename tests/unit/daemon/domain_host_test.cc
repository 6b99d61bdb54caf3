// What this host's libvirt is to a migration. Pure parts.
#include "agent/daemon/domain_host.h"

#include <gtest/gtest.h>

namespace baton::daemon {
namespace {

TEST(QemuConf, CommentsAndOtherFields_AreNotValues) {
  const std::string text =
      "# user = \"commented\"\n"
      "user_space = \"no\"\n"
      "  user = \"first\"\n"
      "user=\"+64055\" # the last one counts\n"
      "group = 'kvm'\n"
      "broken = \"no end\n";
  EXPECT_EQ(QemuConfValue(text, "user"), "+64055");
  EXPECT_EQ(QemuConfValue(text, "group"), "kvm");
  EXPECT_EQ(QemuConfValue(text, "broken"), "");
  EXPECT_EQ(QemuConfValue(text, "absent"), "");
}

v1::Domain WithDisks(const std::vector<std::string>& paths) {
  v1::Domain domain;
  for (size_t i = 0; i < paths.size(); ++i) {
    v1::DomainDevice* disk = domain.add_devices();
    disk->set_type("disk");
    disk->set_attachment("plain");
    disk->set_name(std::string("vd") + static_cast<char>('a' + i));
    disk->set_source(paths[i]);
  }
  return domain;
}

TEST(DisksAreShared, EveryWritableDiskMustBeBelowADeclaredPath) {
  const std::vector<std::string> shared = {"/mnt/images"};
  EXPECT_TRUE(DisksAreShared(WithDisks({"/mnt/images/a.img"}), {}, shared));
  EXPECT_TRUE(DisksAreShared(WithDisks({"/mnt/images"}), {}, shared));
  EXPECT_FALSE(DisksAreShared(WithDisks({"/mnt/images2/a.img"}), {}, shared)) << "not a component";
  EXPECT_FALSE(DisksAreShared(WithDisks({"/mnt/images/a.img", "/var/b.img"}), {}, shared));
  EXPECT_FALSE(DisksAreShared(WithDisks({}), {}, shared)) << "nothing to vouch for";
  EXPECT_FALSE(DisksAreShared(WithDisks({"/mnt/images/a.img"}), {}, {}));
}

TEST(DisksAreShared, CopiedReadOnlyAndNetworkDisks_DoNotCount) {
  v1::Domain domain = WithDisks({"/mnt/images/a.img", "/var/b.img", "/cd.iso", "rbd/pool"});
  domain.mutable_devices(2)->set_readonly(true);
  v1::DomainTarget target;
  target.add_copied_disks("vdb");
  EXPECT_TRUE(DisksAreShared(domain, target, {"/mnt/images"}));
}

}  // namespace
}  // namespace baton::daemon
