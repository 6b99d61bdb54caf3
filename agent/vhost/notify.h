// Notification descriptors of the other side. They may be anything: an eventfd mostly, with User-Mode Linux a
// pipe, with a hostile VMM a pipe that is full or has no reader.
#pragma once

namespace baton::vhost {

// Lets a write to a descriptor whose reader is gone fail with EPIPE instead of ending the process: for
// threads that notify. Blocks every signal on the calling thread.
void BlockSignals();

// Writes one to `fd`. Never waits: what cannot be written at once is left out (an eventfd or pipe that is
// full says already what it is to say). Needs BlockSignals().
void Notify(int fd);

}  // namespace baton::vhost
