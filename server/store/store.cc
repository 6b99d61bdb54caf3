#include "server/store/store.h"

namespace baton::server {

absl::Status Store::ForEach(const std::string& prefix, const std::function<absl::Status(const Item&)>& take) {
  constexpr int kPage = 1000;
  std::string after;
  while (true) {
    ASSIGN_OR_RETURN(auto items, Scan(prefix, after, kPage));
    for (const Item& item : items) RETURN_IF_ERROR(take(item));
    if (items.size() < kPage) return absl::OkStatus();
    after = items.back().key;
  }
}

}  // namespace baton::server
