#include "server/names.h"

#include <sys/random.h>

#include <vector>

#include "common/grpc_status.h"
#include "common/vm_spec.h"

namespace baton::server {

std::string IdOf(const std::string& name) { return name.substr(name.find('/') + 1); }

absl::StatusOr<std::string> ParseName(const std::string& name, const std::string& collection,
                                      const std::string& field) {
  if (name.empty()) return InvalidField(field, fmt::format("is required, as {}/ID", collection));
  if (name.rfind(collection + "/", 0) != 0 || !IsValidName(name.substr(collection.size() + 1))) {
    return InvalidField(field,
                        fmt::format("\"{}\" is not {}/ID, where ID is {}", name, collection, kNameRule));
  }
  return name.substr(collection.size() + 1);
}

absl::Status NoSuch(const std::string& collection, const std::string& id) {
  std::string name = fmt::format("{}/{}", collection, id);
  return WithResource(Error(v1::NOT_FOUND, absl::StatusCode::kNotFound, "{} does not exist", name),
                      collection, name);
}

namespace {
std::vector<uint8_t> RandomBytes(int count) {
  std::vector<uint8_t> bytes(count);
  // Up to 256 bytes never come short and never fail once the pool is initialised.
  (void)!::getrandom(bytes.data(), bytes.size(), 0);
  return bytes;
}
}  // namespace

std::string NewMigrationId(int64_t unix_ms) {
  // Crockford's base 32: no i, l, o, u, so that ids can be read out. Nine digits last until the year 3084.
  constexpr char kDigits[] = "0123456789abcdefghjkmnpqrstvwxyz";
  std::string id(9, '0');
  for (int i = 8; i >= 0; --i, unix_ms /= 32) id[i] = kDigits[unix_ms % 32];
  id += '-';
  for (uint8_t byte : RandomBytes(4)) id += kDigits[byte % 32];
  return id;
}

std::string RandomHex(int bytes) {
  std::string text;
  for (uint8_t byte : RandomBytes(bytes)) text += fmt::format("{:02x}", byte);
  return text;
}

}  // namespace baton::server
