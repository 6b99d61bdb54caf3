// Small files that must survive a crash whole: either the old content or the new one, never a part.
#pragma once

#include <google/protobuf/message_lite.h>

#include <string>

#include "common/status.h"

namespace baton {

// Writes a temporary file beside `path`, fsyncs it, renames it over `path` and fsyncs the directory. Mode
// 0600. Errors carry STATE_WRITE_FAILED and name the path ("disk full", "read-only" …); the old file is then
// untouched.
absl::Status WriteFileDurable(const std::string& path, const std::string& content);
absl::Status WriteMessageDurable(const std::string& path, const google::protobuf::MessageLite& message);
// The same without waiting for the disk: every program sees the new content from now on, and a crash of the
// host may leave the old one or an empty file until SyncFile() has returned.
absl::Status WriteFileSoon(const std::string& path, const std::string& content);
absl::Status WriteMessageSoon(const std::string& path, const google::protobuf::MessageLite& message);
// Makes durable what was written like that: the file and its entry in the directory.
absl::Status SyncFile(const std::string& path);
// NotFound, PermissionDenied, or DataLoss if it does not parse. At most 16 MiB.
absl::Status ReadMessage(const std::string& path, google::protobuf::MessageLite* message);
// unlink and fsync of the directory. OK if it was not there.
absl::Status RemoveFileDurable(const std::string& path);
// mkdir -p with `mode` for what is new. Errors name the first directory that failed.
absl::Status MakeDirectories(const std::string& path, unsigned mode = 0700);
// Removes a directory and all below it. OK if it was not there.
absl::Status RemoveTree(const std::string& path);

}  // namespace baton
