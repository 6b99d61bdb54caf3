#include "common/fd.h"

#include <fcntl.h>

namespace baton {

UniqueFd UniqueFd::Duplicate() const { return UniqueFd(fd_ < 0 ? -1 : ::fcntl(fd_, F_DUPFD_CLOEXEC, 3)); }

}  // namespace baton
