// Runs CUDA kernels on the CPU and watches them: csrc/cuda/kernels/cuda.cuh includes this where nvcc does not compile.
// Each CUDA thread is a thread of its own with its own stack (scheduler.h), all on the OS thread that launches.
// Barriers, shuffles, votes and reductions are where they wait for each other; masks and call sites are checked there,
// and a deadlock is reported with file and line (collectives.h). Shared memory has exact bounds and starts as NaN
// (shared_memory.h). AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer understand all of it: an overflow
// or a misaligned access is reported where it happens, and two CUDA threads that touch the same memory with no barrier
// between are a data race, whichever order they ran in (sanitizers.h).
//
// A kernel that breaks a rule ends its launch with charlm::cuda_emulator::Error, a std::runtime_error.
//
// Environment, read at each launch:
//   CHARLM_CUDA_EMULATOR_SCHEDULE    forward (default), reverse or random: the order in which threads and blocks run
//   CHARLM_CUDA_EMULATOR_SEED        of the random order, a number (default 0)
//
// Not seen: time, the GPU's memory model beyond what fences and barriers order, nvcc's own mistakes, approximate
// arithmetic. Blocks run one after another, so a block that waits for another one never ends: give tests a time-out.
#pragma once

#include "collectives.h"
#include "cuda_types.h"
#include "device_functions.h"
#include "launch.h"
#include "shared_memory.h"
