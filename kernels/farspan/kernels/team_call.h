// What a kernel knows of the team of threads that does its work (team/native.cpp).
#pragma once

#include <cstdint>

extern "C" {

// Share `index` of a level, by thread `thread` of the call.
typedef void (*farspan_work)(const void* context, int64_t level, int64_t index, int64_t thread);
// What a share will read that no level before it makes can be asked for now: its thread has to wait. May be null.
typedef void (*farspan_ahead)(const void* context, int64_t level, int64_t index);
typedef void (*farspan_team)(farspan_work, farspan_ahead, const void* context, int64_t levels, const int64_t* counts,
                             int64_t threads);
}
