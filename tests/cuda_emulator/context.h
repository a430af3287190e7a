// Stacks, and the switch between them. Unlike swapcontext(), this switch makes no system call.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "sanitizers.h"

#if !defined(__x86_64__) || !defined(__linux__)
#error "the CUDA emulator can switch stacks on x86-64 Linux only"
#endif

// Saves the registers that a function must preserve and the stack pointer to *from, and continues where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void charlm_cuda_emulator_switch(void** from, void* to);
asm(R"(
.pushsection .text.charlm_cuda_emulator_switch, "axG", @progbits, charlm_cuda_emulator_switch, comdat
.weak charlm_cuda_emulator_switch
.hidden charlm_cuda_emulator_switch
.type charlm_cuda_emulator_switch, @function
charlm_cuda_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size charlm_cuda_emulator_switch, . - charlm_cuda_emulator_switch
.popsection
)");

namespace charlm::cuda_emulator {

// A flow of control that can be suspended and resumed.
struct Context {
  void* stack_pointer = nullptr;
  Stack stack;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* identity = nullptr;    // ThreadSanitizer's
};

// A guard page lies below each stack.
CHARLM_EMULATOR_CODE inline Stack allocate_stack() {
  constexpr size_t kBytes = 128 << 10;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const memory = mmap(nullptr, page + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) std::abort();
  return {static_cast<char*>(memory) + page, kBytes};
}

// Makes `context` start with entry() on its stack. entry() must not return.
CHARLM_EMULATOR_CODE inline void prepare(Context& context, void (*entry)(), size_t offset) {
  void** top = reinterpret_cast<void**>(context.stack.bottom + context.stack.size - offset);
  *--top = nullptr;  // where entry() would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;  // the saved registers
  context.stack_pointer = top;
}

// Returns when `from` is resumed; never, if it `ends`.
CHARLM_EMULATOR_CODE inline void switch_context(Context& from, Context& to, bool ends) {
  leave_stack(ends ? nullptr : &from.fake_stack, to.stack);
  switch_identity(to.identity);
  charlm_cuda_emulator_switch(&from.stack_pointer, to.stack_pointer);
  Stack previous;
  enter_stack(from.fake_stack, previous);
}

}  // namespace charlm::cuda_emulator
