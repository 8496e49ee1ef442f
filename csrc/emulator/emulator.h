// Runs the source of a kernel on the CPU, for tests. Every CUDA thread of every block is a fiber; fibers wait for each
// other at barriers and tensor-core instructions. No GPU, no CUDA header.
//
// The emulator refuses:
//   an address that is not aligned, or outside of the tensors of the launch;
//   a read of anything but W, and any write, before the wait for the previous kernel;
//   a thread that ends without that wait;
//   two threads that use a word of shared memory without a barrier between;
//   a deadlock.
// The caller chooses the order in which fibers run: a result that depends on it is a race. The emulator cannot see
// time, and the order in which memory becomes visible between blocks.
#pragma once
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace t2::emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  uint32_t a[32][4], b[32][2];
  float* d[32];
};

// Who last wrote and read a word of shared memory, and between which two barriers: of the block, and of its cluster.
struct Shadow {
  int writer = -1, reader = -1;
  unsigned written = 0, read = 0;
  unsigned cluster_written = 0, cluster_read = 0;  // cluster_read: by another block, after how many barriers; 0: never
};

struct Cluster {
  int threads = 0, arrived = 0;
  unsigned generation = 1;
};

struct Block {
  unsigned index = 0, rank = 0;  // rank: in its cluster
  int threads = 0, arrived = 0, ended = 0;
  unsigned generation = 0;
  Cluster* cluster = nullptr;
  std::vector<Warp> warps;
  std::vector<uint32_t> shared;
  std::vector<Shadow> shadow;
};

enum Kind { W, X, SCALE, BIAS, BASE, IDS, Y };

struct Range {
  Kind kind;
  uintptr_t begin, end;
};

struct Fiber {
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = false, waited = false;
  const unsigned* word = nullptr;  // sleeps until *word differs from value
  unsigned value = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

constexpr size_t STACK = 1 << 17, SHARED_WORDS = 1 << 15;

struct Machine {
  std::vector<Cluster> clusters;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  std::vector<Range> ranges;
  std::unique_ptr<char[]> stacks;
  size_t stacks_size = 0;
  std::function<void()> body;
  std::string error;
  Fiber* current = nullptr;
  Fiber scheduler;
  long long progress = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const std::string& what) {
  const Fiber& f = *machine.current;
  const std::string block = std::to_string(f.block->index), thread = std::to_string(f.thread);
  throw std::runtime_error(what + " (block " + block + ", thread " + thread + ")");
}

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer in *from, and continues `to` where it stopped.
extern "C" void t2_switch(void** from, void* to);
asm(R"(
.text
.globl t2_switch
.hidden t2_switch
.type t2_switch, @function
t2_switch:
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
.size t2_switch, .-t2_switch
)");
#endif

inline void switch_to(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
  t2_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
}

inline void yield() { switch_to(*machine.current, machine.scheduler); }

inline void sleep_while(const unsigned& word, unsigned value) {
  machine.current->word = &word;
  machine.current->value = value;
  yield();
}

inline void enter_fiber() {
  try {
    machine.body();
    if (!machine.current->waited) fail("a thread ended without waiting for the previous kernel");
  } catch (const std::exception& e) {
    if (machine.error.empty()) machine.error = e.what();
  }
  machine.current->done = true;
  ++machine.current->block->ended;
  ++machine.progress;
  yield();
}

inline void prepare(Fiber& f, char* stack) {
#if defined(__x86_64__)
  auto top = reinterpret_cast<uintptr_t>(stack + STACK) & ~uintptr_t(15);
  // six registers, the return address, and the words that a call would have pushed
  auto* words = reinterpret_cast<void**>(top - 64);
  std::memset(words, 0, 64);
  words[6] = reinterpret_cast<void*>(&enter_fiber);
  f.stack_pointer = words;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = stack;
  f.context.uc_stack.ss_size = STACK;
  f.context.uc_link = nullptr;
  makecontext(&f.context, enter_fiber, 0);
#endif
}

// Runs `body` in every thread of every block, all blocks together. order: 0 forwards, 1 backwards, others a shuffle
// each.
inline void run(unsigned blocks, unsigned threads, unsigned cluster, unsigned order, std::function<void()> body) {
  Machine& m = machine;
  const size_t count = size_t(blocks) * threads;
  m.body = std::move(body), m.error.clear(), m.progress = 0;
  m.blocks.assign(blocks, Block());
  m.clusters.assign((blocks + cluster - 1) / cluster, Cluster());
  m.fibers.assign(count, Fiber());
  if (m.stacks_size < count * STACK) m.stacks.reset(new char[m.stacks_size = count * STACK]);
  for (unsigned i = 0; i < blocks; ++i) {
    Block& b = m.blocks[i];
    b.index = i, b.rank = i % cluster, b.threads = int(threads);
    b.cluster = &m.clusters[i / cluster];
    b.cluster->threads += int(threads);
    b.warps.resize(threads / 32);
    b.shared.assign(SHARED_WORDS, 0xffffffffu);  // NaN
    b.shadow.assign(SHARED_WORDS, Shadow());
  }
  std::vector<size_t> turns(count);
  for (size_t i = 0; i < count; ++i) {
    turns[i] = order == 1 ? count - 1 - i : i;
    m.fibers[i].block = &m.blocks[i / threads];
    m.fibers[i].thread = unsigned(i % threads);
    prepare(m.fibers[i], m.stacks.get() + i * STACK);
  }
  uint64_t random = order * 0x9e3779b97f4a7c15ull + 1;
  size_t alive = count;
  while (alive && m.error.empty()) {
    if (order > 1)
      for (size_t i = count - 1; i; --i) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        std::swap(turns[i], turns[random % (i + 1)]);
      }
    const long long before = m.progress;
    alive = 0;
    for (size_t i : turns) {
      Fiber& f = m.fibers[i];
      if (f.done) continue;
      if (!f.word || *f.word != f.value) {
        m.progress += f.word != nullptr;
        f.word = nullptr;
        m.current = &f;
        switch_to(m.scheduler, f);
      }
      alive += !f.done;
    }
    if (alive && before == m.progress && m.error.empty()) m.error = "deadlock: every thread waits for another";
  }
  if (!m.error.empty()) throw std::runtime_error(m.error);
}

inline void check(const void* p, size_t bytes, Kind kind) {
  static const char* const NAMES[] = {"W", "x", "scale", "bias", "base", "ids", "y"};
  const auto at = reinterpret_cast<uintptr_t>(p);
  if (at % bytes) fail(std::string(NAMES[kind]) + ": an address is not aligned");
  if (kind != W && !machine.current->waited) {
    fail(std::string(NAMES[kind]) + " is used before the wait for the previous kernel");
  }
  for (const Range& r : machine.ranges)
    if (r.kind == kind && at >= r.begin && at + bytes <= r.end) return;
  fail(std::string(NAMES[kind]) + ": an address outside of it");
}

inline Shadow& shadow_of(const float* p, Block& b) {
  const auto* word = reinterpret_cast<const uint32_t*>(p);
  if (word < b.shared.data() || word >= b.shared.data() + b.shared.size()) fail("an address outside of shared memory");
  return b.shadow[size_t(word - b.shared.data())];
}

}  // namespace t2::emulator
