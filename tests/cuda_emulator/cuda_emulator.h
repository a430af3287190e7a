// Runs CUDA kernels on the CPU and checks them: csrc/cuda/cuda.cuh includes this where the compiler is not nvcc. Each
// CUDA thread has its own stack and is scheduled cooperatively (scheduler.h), on the OS thread that launches. Threads
// wait for each other in barriers, shuffles, votes and reductions, which check masks and call sites and report a
// deadlock with file and line (collectives.h). Shared memory has exact bounds and starts as NaN (shared_memory.h).
// AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer are told about stacks, memory and order: an overflow
// or a misaligned access is reported where it happens, and two CUDA threads that access the same memory without a
// barrier between them are a data race, in whichever order they ran (sanitizers.h).
//
// A kernel that breaks a rule ends its launch with charlm::cuda_emulator::Error, a std::runtime_error.
//
// Environment, read at each launch:
//   CHARLM_CUDA_EMULATOR_SCHEDULE    forward (default), reverse or random: the order in which threads and blocks run
//   CHARLM_CUDA_EMULATOR_SEED        of the random order, a number (default 0)
//
// Not emulated: time, the GPU's memory model beyond the order of fences and barriers, nvcc's code generation, and
// approximate arithmetic. Blocks run one after another, so a block that waits for another one never ends: tests need a
// time-out.
#pragma once

#include "async.h"
#include "collectives.h"
#include "cuda_types.h"
#include "device_functions.h"
#include "launch.h"
#include "shared_memory.h"
#include "transfers.h"
