// Addresses, reasons, error details and credentials as they travel through gRPC.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cstring>
#include <fstream>

#include "common/fd.h"
#include "common/grpc_credentials.h"
#include "common/grpc_status.h"
#include "common/listen.h"
#include "common/metrics.h"
#include "common/reason.h"
#include "common/units.h"
#include "tests/temp_dir.h"

namespace baton {
namespace {

using test::TempDir;

TEST(Address, LocalMeansNeverLeavesTheMachine) {
  for (const char* local : {"127.0.0.1:1", "127.8.9.1:1", "[::1]:1", "localhost:1", "unix:/x"}) {
    EXPECT_TRUE(ParseAddress(local)->IsLocal()) << local;
  }
  for (const char* remote :
       {"0.0.0.0:1", "10.0.0.1:1", "[::]:1", "example.org:1", "127.example.org:1", ":1"}) {
    EXPECT_FALSE(ParseAddress(remote)->IsLocal()) << remote;
  }
}

TEST(Listen, ProbeTellsAListenerFromALeftoverSocket) {
  TempDir dir;
  std::string path = dir / "s";
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::strcpy(name.sun_path, path.c_str());
  {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM, 0));
    ASSERT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&name), sizeof name), 0);
    ASSERT_EQ(::listen(fd.get(), 1), 0);
    EXPECT_EQ(ProbeListen(*ParseAddress("unix:" + path)).code(), absl::StatusCode::kAlreadyExists);
  }
  EXPECT_TRUE(ProbeListen(*ParseAddress("unix:" + path)).ok());
  EXPECT_EQ(ProbeListen(*ParseAddress("unix:" + (dir / "no/such/s"))).code(), absl::StatusCode::kNotFound);
}

TEST(Reason, EveryReasonHasACodeAndALabel) {
  for (int value = 0; value < v1::Reason_ARRAYSIZE; ++value) {
    ASSERT_TRUE(v1::Reason_IsValid(value)) << value << ": the enum has a hole; the table must be adapted";
    auto reason = static_cast<v1::Reason>(value);
    bool success = reason == v1::REASON_UNSPECIFIED || reason == v1::NONE;
    EXPECT_EQ(CodeOf(reason) == absl::StatusCode::kOk, success) << v1::Reason_Name(reason);
    EXPECT_FALSE(LabelOf(reason).empty());
    absl::Status back = FromGrpc(ToGrpc(ErrorOf(reason, "m")));
    EXPECT_EQ(ReasonOf(back, v1::REASON_UNSPECIFIED), reason);
    EXPECT_EQ(Message(back), "m");
  }
  EXPECT_EQ(LabelOf(v1::DRAIN_TIMEOUT), "drain_timeout");
  EXPECT_EQ(LabelOf(static_cast<v1::Reason>(999)), "unknown");
  EXPECT_EQ(CodeOf(static_cast<v1::Reason>(999)), absl::StatusCode::kInternal);
}

TEST(GrpcStatus, DetailsSurviveTheWire) {
  absl::Status status = Error(v1::VM_NOT_MIGRATABLE, absl::StatusCode::kFailedPrecondition, "busy");
  status = WithField(status, "migration.vm", "is in a migration");
  status = WithField(status, "migration.destination", "is cordoned");
  status = WithResource(status, "vms", "vms/web1");
  status = WithRetry(status, std::chrono::milliseconds(2500));
  status = WithPrecondition(status, "VM_NOT_MIGRATABLE", "vms/web1", "one migration a VM");
  status = WithMetadata(status, "guest_location", "SOURCE");
  grpc::Status wire = ToGrpc(status);
  EXPECT_EQ(wire.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  absl::Status back = FromGrpc(wire);
  EXPECT_EQ(ReasonOf(back), v1::VM_NOT_MIGRATABLE);
  EXPECT_EQ(BadRequestOf(back).field_violations_size(), 2);
  EXPECT_EQ(BadRequestOf(back).field_violations(1).field(), "migration.destination");
  EXPECT_EQ(ResourceInfoOf(back).resource_name(), "vms/web1");
  EXPECT_EQ(RetryDelayOf(back), std::chrono::milliseconds(2500));
  EXPECT_EQ(PreconditionFailureOf(back).violations(0).subject(), "vms/web1");
  EXPECT_EQ(MetadataOf(back)["guest_location"], "SOURCE");
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(wire.error_details()));
  for (const auto& any : details.details()) EXPECT_EQ(any.type_url().rfind("type.googleapis.com/", 0), 0u);
}

TEST(GrpcStatus, ForeignErrorsPassUnchanged) {
  EXPECT_TRUE(FromGrpc(grpc::Status::OK).ok());
  EXPECT_TRUE(ToGrpc(absl::OkStatus()).ok());
  absl::Status plain = FromGrpc(grpc::Status(grpc::StatusCode::UNAVAILABLE, "x", "not a protobuf"));
  EXPECT_EQ(plain.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ReasonOf(plain, v1::REASON_UNSPECIFIED), v1::REASON_UNSPECIFIED);
}

TEST(Credentials, InsecureOnlyOnLocalAddresses) {
  EXPECT_TRUE(MakeServerCredentials(*ParseAddress("127.0.0.1:0"), {}).ok());
  EXPECT_TRUE(MakeServerCredentials(*ParseAddress("unix:/x"), {}).ok());
  absl::Status status = MakeServerCredentials(*ParseAddress("0.0.0.0:7400"), {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(status).find("tls.ca"), std::string::npos);
  EXPECT_FALSE(MakeChannel(*ParseAddress("10.0.0.1:7400"), {}).ok());
}

TEST(Credentials, EachTlsFileIsCheckedWithItsName) {
  TempDir dir;
  std::string openssl =
      "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={1} -keyout "
      "{0}/{1}.key "
      "-out {0}/{1}.pem 2>/dev/null";
  for (const char* name : {"a", "b"}) {
    ASSERT_EQ(std::system(fmt::format(fmt::runtime(openssl), dir / "", name).c_str()), 0);
  }
  std::ofstream(dir / "junk") << "junk";
  TlsFiles good{dir / "a.pem", dir / "a.pem", dir / "a.key"};
  EXPECT_TRUE(CheckTlsFiles(good).ok()) << CheckTlsFiles(good);
  EXPECT_TRUE(MakeServerCredentials(*ParseAddress("0.0.0.0:0"), good).ok());
  EXPECT_TRUE(MakeChannel(*ParseAddress("10.0.0.1:1"), good).ok());
  auto message = [](TlsFiles files) { return Message(CheckTlsFiles(files)); };
  EXPECT_NE(message({good.ca, good.cert, ""}).find("all three"), std::string::npos);
  EXPECT_NE(message({dir / "none", good.cert, good.key}).find("none: No such file"), std::string::npos);
  EXPECT_NE(message({dir / "junk", good.cert, good.key}).find("no PEM certificate"), std::string::npos);
  EXPECT_NE(message({good.ca, good.cert, dir / "junk"}).find("no unencrypted PEM"), std::string::npos);
  EXPECT_NE(message({good.ca, good.cert, dir / "b.key"}).find("does not belong"), std::string::npos);
}

TEST(Metrics, PortInUseIsSaid) {
  auto first = MetricsEndpoint::Start(*ParseAddress("127.0.0.1:0"), std::make_shared<prometheus::Registry>());
  ASSERT_TRUE(first.ok()) << first.status();
  auto second = MetricsEndpoint::Start(*ParseAddress(fmt::format("127.0.0.1:{}", (*first)->port())),
                                       std::make_shared<prometheus::Registry>());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_NE(Message(second.status()).find("in use"), std::string::npos);
  EXPECT_FALSE(MetricsEndpoint::Start(*ParseAddress("unix:/x"), nullptr).ok());
}

}  // namespace
}  // namespace baton
