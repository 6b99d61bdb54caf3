// The inventory and a real libvirtd with real QEMUs, in namespaces of their own.
#include "agent/vmm/libvirt/inventory.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <libvirt/libvirt.h>

#include <condition_variable>
#include <csignal>
#include <filesystem>
#include <future>
#include <mutex>

#include "tests/integration/libvirt/libvirt_host.h"
#include "tests/temp_dir.h"

namespace baton::vmm {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

class LibvirtInventoryTest : public testing::Test {
 protected:
  void SetUp() override { host_.emplace(dir_ + "/host"); }
  void TearDown() override {
    inventory_.reset();
    host_->Kill();
    if (HasFailure()) {
      std::filesystem::copy(dir_ + "/host.log", "libvirt-inventory-test.log",
                            std::filesystem::copy_options::overwrite_existing);
    }
  }

  void StartInventory(Duration view_interval = seconds(60)) {
    InventoryOptions options;
    options.libvirt.uri = host_->uri();
    options.libvirt.keepalive = seconds(10);
    options.call_timeout = seconds(30);
    options.view_interval = view_interval;
    options.mediator_dir = "/run/baton/vms";
    InventoryCallbacks callbacks;
    callbacks.on_vm = [this](const v1::Vm& vm) {
      std::lock_guard lock(mutex_);
      vms_[vm.name()] = vm;
      changed_.notify_all();
    };
    callbacks.on_gone = [this](const v1::Vm& vm, const std::string&) {
      std::lock_guard lock(mutex_);
      vms_.erase(vm.name());
      changed_.notify_all();
    };
    callbacks.on_read = [this] {
      std::lock_guard lock(mutex_);
      read_ = true;
      changed_.notify_all();
    };
    inventory_ = LibvirtInventory::Start(std::move(options), std::move(callbacks));
  }
  // The daemon is there and all of its domains were read.
  bool AwaitRead() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kSoon, [this] { return read_; }) && inventory_->read();
  }

  // Waits until `done` says true for the VM (null when it is gone).
  bool Await(const std::string& name, const std::function<bool(const v1::Vm*)>& done) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kSoon, [&] {
      auto found = vms_.find("vms/" + name);
      return done(found == vms_.end() ? nullptr : &found->second);
    });
  }
  v1::Vm Vm(const std::string& name) {
    std::lock_guard lock(mutex_);
    return vms_["vms/" + name];
  }

  absl::Status Run(const std::string& what, const std::function<bool(virConnectPtr)>& call) {
    return inventory_->connection().Call(
        what, [what, call](virConnectPtr c) { return call(c) ? absl::OkStatus() : LibvirtError(what); },
        Deadline::After(kSoon));
  }
  absl::Status Create(const std::string& name, const std::string& devices = "") {
    const std::string xml = "<domain type='qemu'><name>" + name +
                            "</name><memory unit='MiB'>16</memory><vcpu>1</vcpu>"
                            "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
                            "<os><type arch='x86_64' machine='q35'>hvm</type></os><devices>" +
                            devices + "<memballoon model='virtio'/></devices></domain>";
    return Run("create", [xml](virConnectPtr c) {
      DomainPtr domain(virDomainCreateXML(c, xml.c_str(), 0));
      return domain != nullptr;
    });
  }
  absl::Status With(const std::string& name, const std::function<int(virDomainPtr)>& call) {
    return Run(name, [name, call](virConnectPtr c) {
      DomainPtr domain(virDomainLookupByName(c, name.c_str()));
      return domain && call(domain.get()) == 0;
    });
  }

  const test::TempDir temp_;
  const std::string& dir_ = temp_.path();
  std::optional<LibvirtHost> host_;
  std::unique_ptr<LibvirtInventory> inventory_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, v1::Vm> vms_;
  bool read_ = false;
};

bool Is(const v1::Vm* vm, v1::Vm::State state) { return vm != nullptr && vm->state() == state; }

TEST_F(LibvirtInventoryTest, DomainsAreFoundFollowedAndForgotten) {
  ASSERT_TRUE(host_->Start().ok());
  StartInventory();
  ASSERT_TRUE(AwaitRead()) << inventory_->connection().trouble();
  EXPECT_TRUE(inventory_->Vms().empty());

  absl::Status created = Create("web1", "<interface type='user'><model type='virtio'/></interface>");
  ASSERT_TRUE(created.ok()) << created;
  ASSERT_TRUE(Await(
      "web1", [](const v1::Vm* vm) { return Is(vm, v1::Vm::RUNNING) && vm->domain().has_vmm_asked(); }));
  const v1::Vm vm = Vm("web1");
  EXPECT_EQ(vm.driver(), "libvirt");
  EXPECT_EQ(vm.domain().vcpus(), 1u);
  EXPECT_EQ(vm.domain().memory_bytes(), 16u << 20);
  EXPECT_EQ(vm.domain().memory_backing(), "memfd, shared");
  EXPECT_THAT(vm.domain().vmm_version(), HasSubstr("QEMU "));
  EXPECT_THAT(vm.domain().machine(), HasSubstr("q35"));
  EXPECT_FALSE(vm.domain().persistent());
  ASSERT_EQ(vm.domain().devices_size(), 2);
  EXPECT_EQ(vm.domain().devices(0).type(), "interface");
  EXPECT_EQ(vm.domain().devices(0).attachment(), "plain");
  EXPECT_FALSE(vm.domain().devices(0).started()) << "no driver runs in a guest without a disk";
  EXPECT_EQ(vm.domain().devices(1).type(), "balloon");

  ASSERT_TRUE(With("web1", virDomainSuspend).ok());
  ASSERT_TRUE(Await(
      "web1", [](const v1::Vm* v) { return Is(v, v1::Vm::PAUSED) && v->message() == "paused by a user"; }));
  ASSERT_TRUE(With("web1", virDomainResume).ok());
  ASSERT_TRUE(Await("web1", [](const v1::Vm* v) { return Is(v, v1::Vm::RUNNING); }));
  ASSERT_TRUE(With("web1", virDomainDestroy).ok());
  EXPECT_TRUE(Await("web1", [](const v1::Vm* v) { return v == nullptr; }));
}

TEST_F(LibvirtInventoryTest, DaemonThatComesLaterAndDies_IsFoundEachTime) {
  StartInventory();
  // Nobody is kept waiting for a daemon that is not there.
  EXPECT_FALSE(inventory_->WaitForFirst(Deadline::After(kSoon)));
  EXPECT_FALSE(inventory_->connection().connected());
  absl::Status early = Create("web1");
  EXPECT_TRUE(absl::IsUnavailable(early)) << early;
  ASSERT_TRUE(host_->Start().ok());
  ASSERT_TRUE(AwaitRead()) << inventory_->connection().trouble();
  ASSERT_TRUE(Create("web1").ok());
  ASSERT_TRUE(Await("web1", [](const v1::Vm* vm) { return Is(vm, v1::Vm::RUNNING); }));
  // The whole host goes, QEMU with it: what was known stays, and says that it is not fresh.
  host_->Kill();
  ASSERT_TRUE(Await("web1", [](const v1::Vm* vm) {
    return vm != nullptr && vm->message().find("as last seen") != std::string::npos;
  })) << Vm("web1").message();
  EXPECT_EQ(inventory_->Vms().size(), 1u);
  ASSERT_TRUE(host_->Start().ok());
  // The new daemon finds that this QEMU has ended.
  EXPECT_TRUE(Await("web1", [](const v1::Vm* vm) { return vm == nullptr; }));
  EXPECT_TRUE(inventory_->connection().connected());
}

TEST_F(LibvirtInventoryTest, HungDaemon_CallsEndAtTheirDeadline) {
  ASSERT_TRUE(host_->Start().ok());
  StartInventory();
  ASSERT_TRUE(AwaitRead());
  // Holds a call open inside libvirt's thread, as a stuck monitor does.
  const auto begin = Clock::now();
  auto gate = std::make_shared<std::promise<void>>();
  absl::Status status = inventory_->connection().Call(
      "a call that hangs",
      [gate](virConnectPtr) {
        gate->get_future().wait();
        return absl::OkStatus();
      },
      Deadline::After(milliseconds(200)));
  EXPECT_TRUE(absl::IsDeadlineExceeded(status)) << status;
  EXPECT_LT(Clock::now() - begin, seconds(20));
  // Others go on meanwhile.
  EXPECT_TRUE(Create("web1").ok());
  gate->set_value();
}

TEST_F(LibvirtInventoryTest, NameThatIsNoId_IsListedByUuid) {
  ASSERT_TRUE(host_->Start().ok());
  StartInventory();
  ASSERT_TRUE(AwaitRead());
  ASSERT_TRUE(Create("ns_Web").ok());
  std::unique_lock lock(mutex_);
  ASSERT_TRUE(changed_.wait_for(lock, kSoon, [&] { return vms_.size() == 1; }));
  const v1::Vm vm = vms_.begin()->second;
  lock.unlock();
  EXPECT_EQ(vm.name(), "vms/" + vm.domain().uuid());
  EXPECT_TRUE(inventory_->Find("ns_Web").ok());
  EXPECT_TRUE(inventory_->Find(vm.domain().uuid()).ok());
  EXPECT_TRUE(absl::IsNotFound(inventory_->Find("other").status()));
}

}  // namespace
}  // namespace baton::vmm
