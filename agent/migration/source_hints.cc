// Round 0 when the guest tells which of its pages are free: what is not hinted goes first, what is hinted
// stays behind, and only the dirty sources say in the end which of it need not go at all.
#include <algorithm>

#include "agent/migration/source_impl.h"
#include "common/log.h"
#include "common/pause_point.h"

namespace baton::migration {
namespace {

// While hints still come in, memory is sent in pieces, so that those that come are of use for the next piece.
constexpr uint64_t kPiecePages = (uint64_t{64} << 20) / memory::kPageSize;

// Moves the first `limit` pages of `from` to `out`.
void TakePiece(memory::PageSets& from, uint64_t limit, memory::PageSets& out) {
  for (size_t block = 0; block < from.size() && limit > 0; ++block) {
    uint64_t at = 0;
    for (auto run = from[block].NextRun(at); run.count > 0 && limit > 0; run = from[block].NextRun(at)) {
      const uint64_t count = std::min(run.count, limit);
      out[block].SetRange(run.first, count);
      from[block].ClearRange(run.first, count);
      at = run.first + count;
      limit -= count;
    }
  }
}

void SubtractSets(memory::PageSets& from, const memory::PageSets& what) {
  for (size_t block = 0; block < from.size(); ++block) from[block].Subtract(what[block]);
}

}  // namespace

// Right after every dirty source was started: nothing has been copied yet, so what they have seen until now
// will be sent anyway, and from here on they see everything that matters to hints.
absl::Status OutgoingMigration::Impl::BeginHints() {
  memory::HintSource* source = p_.devices.hints();
  if (source == nullptr || (o_.params.has_free_page_hints() && !o_.params.free_page_hints()))
    return absl::OkStatus();
  memory::PageSets baseline = p_.ram.MakeSets();
  RETURN_IF_ERROR(Harvest(baseline));
  hints_.emplace(*source, p_.ram.MakeSets(), o_.hints);
  absl::Status begun = hints_->Begin();
  if (begun.ok()) PausePoint(o_.pause_dir, "hinting");
  if (!begun.ok()) {
    LOG_INFO("migration {}: no free page hints: {}", o_.migration_id, Message(begun));
    reporter_.Update(
        [&](v1::SideReport& r) { r.mutable_progress()->mutable_hints()->set_unused(Message(begun)); });
    hints_.reset();
  }
  return absl::OkStatus();
}

absl::Status OutgoingMigration::Impl::SendHinted(const memory::PageSets& pages, Deadline deadline) {
  const auto interrupted = [this] { return Interrupted(); };
  RETURN_IF_ERROR(hints_->AwaitHead(interrupted));
  deferred_ = pages;
  for (bool last = false; !last;) {
    last = hints_->settled();
    memory::PageSets wanted = deferred_;
    SubtractSets(wanted, hints_->Hinted());
    memory::PageSets piece = p_.ram.MakeSets();
    TakePiece(wanted, last ? UINT64_MAX : kPiecePages, piece);
    const bool nothing = CountBytes(piece) == 0;
    if (!nothing) RETURN_IF_ERROR(sender_->SendRound(piece, 0, {}, deadline));
    SubtractSets(deferred_, piece);
    // Everything else has gone: now the guest has to come to an end. If it does not, what it has named counts
    // for nothing, and goes with the last piece.
    if (nothing && !last) RETURN_IF_ERROR(hints_->Settle(interrupted));
    RETURN_IF_ERROR(Interrupted());
  }
  return absl::OkStatus();
}

// `dirty`: what the first harvest after the baseline gave. Pages that were left behind and are in it go with
// round 1 like any other; the others are not sent.
absl::Status OutgoingMigration::Impl::ResolveHints(const memory::PageSets& dirty) {
  if (!hints_) return absl::OkStatus();
  ASSIGN_OR_RETURN(memory::PageSets skip, hints_->Resolve(dirty));
  memory::PageSets skipped = std::move(deferred_);
  SubtractSets(skipped, dirty);
  memory::PageSets unexplained = skipped;
  SubtractSets(unexplained, skip);
  if (CountBytes(unexplained) > 0) return absl::InternalError("pages were left behind without a valid hint");
  hint_bytes_ = CountBytes(skipped);
  v1::HintFigures figures = hints_->figures();
  figures.set_spoilt(figures.hinted() - std::min(figures.hinted(), hint_bytes_.load()));
  LOG_INFO("migration {}: free page hints: {} bytes named, {} not sent{}{}", o_.migration_id,
           figures.hinted(), hint_bytes_.load(), figures.unused().empty() ? "" : "; ", figures.unused());
  reporter_.Update([&](v1::SideReport& r) { *r.mutable_progress()->mutable_hints() = figures; });
  // From the guest's point of view this is a lot of memory, and nothing here needs it any more.
  hints_.reset();
  deferred_ = {};
  return absl::OkStatus();
}

// Whatever way the migration went: a guest that goes on here has its memory and its reporting back.
void OutgoingMigration::Impl::EndHints() {
  hints_.reset();
  if (memory::HintSource* source = p_.devices.hints()) {
    source->Finish();
    source->AllowDiscard(true);
  }
}

}  // namespace baton::migration
