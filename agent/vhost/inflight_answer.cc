#include "agent/vhost/inflight_answer.h"

#include "agent/vhost/quirks.h"
#include "agent/vhost/wire.h"

namespace baton::vhost {

v1::InflightAnswer AnswerFor(const v1::MigrationParams& params, const std::string& device,
                             v1::DeviceClass device_class) {
  v1::InflightAnswer answer = params.inflight();
  for (const v1::InflightRule& rule : params.inflight_rules()) {
    if (rule.device() == device) return rule.answer();
    if (rule.device().empty() && rule.class_() == device_class) answer = rule.answer();
  }
  return answer == v1::HANDOFF ? v1::HANDOFF : v1::DRAIN;
}

HandoffObstacles ObstaclesOf(v1::DeviceClass device_class, v1::BackendKind kind, uint64_t offered_protocol,
                             bool fenced) {
  HandoffObstacles out;
  const Quirks quirks = QuirksOf(kind);
  if (device_class != v1::BLK) {
    out.handoff = out.takeover = "only requests of block devices are handed over";
  } else if (quirks.inflight == virtio::InflightKind::kUnknown) {
    out.handoff = out.takeover =
        "the kind of its back-end is not configured, so what it answers cannot be told";
  } else if (!(offered_protocol & pf::kInflightShmfd)) {
    out.handoff = out.takeover = "its back-end keeps no in-flight region (INFLIGHT_SHMFD)";
  } else {
    if (!(offered_protocol & pf::kSkipDrain) &&
        !((offered_protocol & pf::kGetVringBaseInflight) && quirks.bit_20)) {
      out.handoff = "its back-end cannot stop without completing what it has (GET_VRING_BASE_SKIP_DRAIN)";
    }
    if (virtio::TraitsOf(quirks.inflight).start_base == virtio::BaseConvention::kNone)
      out.takeover = "where its back-end begins with requests in flight is not known";
  }
  if (!quirks.confirms_cancel && !fenced) {
    out.writes =
        "its back-end does not confirm that stopped requests have no effect any more, and no fence is "
        "configured";
  }
  return out;
}

}  // namespace baton::vhost
