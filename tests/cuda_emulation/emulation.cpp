// The machine behind tests/cuda_emulation/cuda_runtime.h: fibers for threads, barriers, and the watch over memory.
//
// Kernel sources are compiled with -fsanitize=thread and linked without its runtime: the compiler then calls the
// __tsan_ functions at the end of this file before every access to memory that is not a local variable.
#include <cuda_runtime.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

// Of this library, by the linker: where __shared__ variables are.
extern "C" __attribute__((visibility("hidden"))) char __bss_start, _end;

namespace cuda_emulation {

Context context;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kMaxThreads = 1024;

struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return line == other.line && !strcmp(file, other.file); }
};

// ---- fibers ----

// The frame, stack and instruction pointers; the compiler saves the rest. ucontext's own switch makes system calls.
using Jump = void* [5];

[[gnu::noinline, noreturn]] void jump_to(Jump& jump) { __builtin_longjmp(jump, 1); }
[[gnu::noinline]] void save_and_jump(Jump& from, Jump& to) {
  if (__builtin_setjmp(from) == 0) jump_to(to);
}

enum class State { kReady, kAtBarrier, kInWarp, kExited };

struct Fiber {
  ucontext_t start;
  Jump jump;
  bool started;
  State state;
  Place waits_at;
};

char* stacks;  // of all fibers, one beside the other
std::vector<Fiber> fibers(kMaxThreads);
unsigned current;             // the fiber that runs
thread_local bool in_kernel;  // other threads may be in the code around a launch, which is watched as well
Jump scheduler;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
const std::function<void()>* kernel;
std::string error_text;
cudaError_t error;

char* stack_of(unsigned fiber) { return stacks + fiber * kStackBytes; }

void back_to_scheduler() {
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, scheduler_stack, scheduler_stack_bytes);
  in_kernel = false;
  save_and_jump(fibers[current].jump, scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    (*kernel)();
    fibers[current].state = State::kExited;
    back_to_scheduler();
  }
}

[[gnu::noinline]] void enter(unsigned fiber) {
  if (__builtin_setjmp(scheduler) != 0) return;
  if (fibers[fiber].started) jump_to(fibers[fiber].jump);
  fibers[fiber].started = true;
  setcontext(&fibers[fiber].start);
}

void resume(unsigned fiber) {
  current = fiber;
  const dim3 size = context.block_size;
  context.thread = dim3(fiber % size.x, fiber / size.x % size.y, fiber / size.x / size.y);
  void* fake_stack;
  __sanitizer_start_switch_fiber(&fake_stack, stack_of(fiber), kStackBytes);
  in_kernel = true;
  enter(fiber);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void wait(State state, const char* file, int line) {
  fibers[current].state = state;
  fibers[current].waits_at = {file, line};
  back_to_scheduler();
}

std::string thread_name(unsigned thread) { return "thread " + std::to_string(thread); }
std::string place_name(const Place& place) { return std::string(place.file) + ":" + std::to_string(place.line); }

// ---- barriers ----

unsigned thread_count, at_barrier;
bool backwards;  // the order in which blocks, and their threads, come
Place barrier_place;

// What a lane gives to an operation of its warp.
struct Gift {
  uint64_t words[6];
};

struct Warp {
  unsigned lanes;    // that there are
  unsigned arrived;  // at the operation that the warp's lanes are at
  unsigned mask;
  Place place;
  // Two: a lane may be at the next operation before all have read their values of this one, but not at the one after.
  Gift gifts[2][32];
  unsigned operations;
};
Warp warps[kMaxThreads / 32];

// Time, for the order of accesses: it passes at a barrier of the block and, for the warp alone, at one of the warp.
uint32_t now, block_began, launch_began;
uint32_t warp_now[kMaxThreads / 32];

// Returns the operation's number once all lanes of the mask are at it.
unsigned meet(unsigned mask, const char* file, int line) {
  Warp& warp = warps[current / 32];
  const unsigned lane = current % 32, number = warp.operations;
  mask &= warp.lanes;
  if (!(mask >> lane & 1))
    fault(cudaErrorLaunchFailure, "divergent warp operation: %s is not in its own mask at %s:%d",
          thread_name(current).c_str(), file, line);
  if (warp.arrived == 0) warp.mask = mask, warp.place = {file, line};
  if (warp.mask != mask || !(warp.place == Place{file, line}))
    fault(cudaErrorLaunchFailure, "divergent warp operation: lanes of one warp meet at %s and at %s:%d",
          place_name(warp.place).c_str(), file, line);
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    wait(State::kInWarp, file, line);
  } else {
    warp.arrived = 0;
    ++warp.operations;
    for (unsigned i = 0; i < 32; ++i)
      if (mask >> i & 1) fibers[current / 32 * 32 + i].state = State::kReady;
  }
  return number;
}

// Gives the warp's lanes a value of each of them; valid until the lane's operation after the next one.
const Gift* share(unsigned mask, const Gift& own, const char* file, int line) {
  Warp& warp = warps[current / 32];
  warp.gifts[warp.operations % 2][current % 32] = own;
  return warp.gifts[meet(mask, file, line) % 2];
}

// ---- memory ----

// Who last wrote a byte, and who has read it since time passed.
constexpr uint16_t kSomeLanes = 0x4000;  // | warp: several lanes of it
constexpr uint16_t kSomeWarps = 0x8000;
struct Byte {
  uint32_t written, written_warp_time, read, read_warp_time;
  uint16_t writer, reader;
  bool copying;  // an asynchronous copy into it has not been waited for
};
constexpr size_t kPage = 4096;
std::unordered_map<uintptr_t, std::unique_ptr<Byte[]>> pages;
constexpr size_t kMaxPages = 4096;  // some 400 MB

Byte* byte_at(uintptr_t address) {
  static uintptr_t last_page;
  static Byte* last;
  const uintptr_t page = address / kPage;
  if (page != last_page || pages.empty()) {
    auto& bytes = pages[page];
    if (!bytes) bytes.reset(new Byte[kPage]());
    last_page = page;
    last = bytes.get();
  }
  return last + address % kPage;
}

[[noreturn]] void race(const char* what, uintptr_t address, bool shared, bool write, unsigned other) {
  fault(cudaErrorLaunchFailure, "race in %s memory: %s %s at %#zx, which %s has %s", shared ? "shared" : "global",
        thread_name(current).c_str(), write ? "writes" : "reads", size_t(address),
        other & kSomeWarps   ? "several warps"
        : other & kSomeLanes ? ("warp " + std::to_string(other & ~kSomeLanes)).c_str()
                             : thread_name(other).c_str(),
        what);
}

// Whether an access at `time` by `who`, at that time of its warp, is still unordered to this thread's.
bool unordered(uint32_t time, uint16_t who, uint32_t warp_time) {
  if (time != now || who == current) return false;
  const unsigned warp = current / 32;
  const bool same_warp = who & kSomeWarps ? false : who & kSomeLanes ? (who & ~kSomeLanes) == warp : who / 32u == warp;
  return !same_warp || warp_time == warp_now[warp];
}

void access(void* pointer, size_t size, bool write) {
  if (!in_kernel) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto within = [&](const void* begin, const void* end) {
    return address >= reinterpret_cast<uintptr_t>(begin) && address < reinterpret_cast<uintptr_t>(end);
  };
  if (within(stacks, stacks + kMaxThreads * kStackBytes) || within(&context, &context + 1)) return;
  if (__asan_region_is_poisoned(pointer, size)) {
    __asan_describe_address(pointer);
    fault(cudaErrorLaunchFailure, "out of bounds: a %s of %zu bytes at %#zx", write ? "write" : "read", size,
          size_t(address));
  }
  const bool shared = within(&__bss_start, &_end);
  const unsigned warp = current / 32;
  for (size_t i = 0; i < size; ++i) {
    Byte& byte = *byte_at(address + i);
    if (byte.copying)
      fault(cudaErrorLaunchFailure, "copy in flight: %s %s shared memory at %#zx, which a copy is still written to",
            thread_name(current).c_str(), write ? "writes" : "reads", size_t(address + i));
    if (unordered(byte.written, byte.writer, byte.written_warp_time))
      race("written", address + i, shared, write, byte.writer);
    if (!shared && byte.written >= launch_began && byte.written < block_began)
      fault(cudaErrorLaunchFailure, "race between blocks: a %s of %#zx, which an earlier block wrote",
            write ? "write" : "read", size_t(address + i));
    if (shared && !write && byte.written < block_began)
      fault(cudaErrorLaunchFailure, "uninitialised: a read of shared memory at %#zx, which the block has not written",
            size_t(address + i));
    if (write) {
      if (unordered(byte.read, byte.reader, byte.read_warp_time)) race("read", address + i, shared, write, byte.reader);
      if (!shared && byte.read >= launch_began && byte.read < block_began)
        fault(cudaErrorLaunchFailure, "race between blocks: a write of %#zx, which an earlier block read",
              size_t(address + i));
      byte.written = now;
      byte.writer = uint16_t(current);
      byte.written_warp_time = warp_now[warp];
    } else if (!unordered(byte.read, byte.reader, byte.read_warp_time)) {
      byte.read = now;
      byte.reader = uint16_t(current);
      byte.read_warp_time = warp_now[warp];
    } else {
      const bool same_warp = !(byte.reader & kSomeWarps) &&
                             (byte.reader & kSomeLanes ? byte.reader & ~kSomeLanes : byte.reader / 32) == int(warp);
      byte.reader = same_warp ? uint16_t(kSomeLanes | warp) : kSomeWarps;
    }
  }
}

// ---- asynchronous copies ----

struct Copy {
  void* to;
  const void* from;
  unsigned group;
};
std::vector<Copy> copies[kMaxThreads];  // that a thread has not waited for
unsigned committed[kMaxThreads];

void set_copying(void* to, bool copying) {
  for (uintptr_t i = 0; i < 16; ++i) byte_at(reinterpret_cast<uintptr_t>(to) + i)->copying = copying;
}

void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16)
    fault(cudaErrorLaunchFailure, "misaligned address: %#zx of 16 bytes", reinterpret_cast<size_t>(p));
}

}  // namespace

void barrier(const char* file, int line) {
  const Place place{file, line};
  if (at_barrier == 0) barrier_place = place;
  if (!(place == barrier_place))
    fault(cudaErrorLaunchFailure, "divergent barrier: %s waits at %s, others at %s", thread_name(current).c_str(),
          place_name(place).c_str(), place_name(barrier_place).c_str());
  if (++at_barrier < thread_count) return wait(State::kAtBarrier, file, line);
  at_barrier = 0;
  ++now;
  for (unsigned i = 0; i < thread_count; ++i) fibers[i].state = State::kReady;
}

void warp_barrier(unsigned mask, const char* file, int line) {
  const unsigned warp = current / 32, before = warps[warp].operations;
  meet(mask, file, line);
  // Of some lanes only it orders too little to be counted on.
  if ((mask & warps[warp].lanes) == warps[warp].lanes) warp_now[warp] = before + 1;
}

uint64_t exchange(unsigned mask, uint64_t value, int lane, const char* file, int line) {
  const Gift* gifts = share(mask, {{value}}, file, line);
  if (!(mask & warps[current / 32].lanes & 1u << lane))
    fault(cudaErrorLaunchFailure, "%s:%d reads lane %d, which takes no part", file, line, lane);
  return gifts[lane].words[0];
}

void load_matrices(bool transposed, unsigned* matrices, const void* row, const char* file, int line) {
  check_aligned(row);
  access(const_cast<void*>(row), 16, false);
  Gift own{};
  memcpy(&own, row, 16);
  const Gift* rows = share(~0u, own, file, line);
  const auto element = [&](unsigned matrix, unsigned r, unsigned column) {
    uint16_t bits;
    memcpy(&bits, reinterpret_cast<const char*>(&rows[matrix * 8 + r]) + 2 * column, 2);
    return unsigned(bits);
  };
  const unsigned major = current % 32 / 4, minor = current % 4 * 2;
  for (unsigned m = 0; m < 4; ++m)
    matrices[m] = transposed ? element(m, minor, major) | element(m, minor + 1, major) << 16
                             : element(m, major, minor) | element(m, major, minor + 1) << 16;
}

void multiply_add_matrices(float* sums, const float* values, unsigned elements, const char* file, int line) {
  Gift own;
  static_assert(sizeof own == 12 * sizeof *values);
  memcpy(&own, values, 6 * elements * sizeof *values);
  const Gift* gifts = share(~0u, own, file, line);
  const auto of_lane = [&](unsigned lane) { return reinterpret_cast<const float*>(&gifts[lane]); };
  const unsigned row = current % 32 / 4, column = current % 4 * 2;
  for (unsigned k = 0; k < 8 * elements; ++k) {
    const unsigned lane = k / elements % 4, half = k / elements / 4;
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned of_a = half * 2 + i / 2, of_b = 4 + half;  // words
      sums[i] += of_lane(row * 4 + lane)[of_a * elements + k % elements] *
                 of_lane((column + i % 2) * 4 + lane)[of_b * elements + k % elements];
    }
  }
}

void start_copy(void* to, const void* from) {
  check_aligned(to);
  access(to, 16, true);
  if (from) {
    check_aligned(from);
    access(const_cast<void*>(from), 16, false);
  }
  set_copying(to, true);
  copies[current].push_back({to, from, committed[current]});
}

void commit_copies() { ++committed[current]; }

void wait_for_copies(unsigned groups) {
  auto& own = copies[current];
  size_t done = 0;
  for (; done < own.size() && own[done].group + groups < committed[current]; ++done) {
    const Copy& copy = own[done];
    set_copying(copy.to, false);
    access(copy.to, 16, true);
    if (copy.from)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
  }
  own.erase(own.begin(), own.begin() + long(done));
}

void fault(cudaError_t kind, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  error = kind;
  error_text = std::string(text) + " (" + thread_name(current) + " of block " + std::to_string(context.block.x) + ")";
  back_to_scheduler();
  abort();  // the scheduler does not come back to this fiber
}

namespace {

// ---- launches ----

void make_fibers(unsigned count) {
  if (!stacks)
    stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned i = 0; i < count; ++i) {
    if (fibers[i].started) continue;
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack.ss_sp = stack_of(i);
    fibers[i].start.uc_stack.ss_size = kStackBytes;
    makecontext(&fibers[i].start, fiber_main, 0);
  }
}

void run_block() {
  block_began = ++now;
  at_barrier = 0;
  for (unsigned i = 0; i < thread_count; ++i) fibers[i].state = State::kReady;
  for (unsigned w = 0; w * 32 < thread_count; ++w) {
    const unsigned lanes = std::min(32u, thread_count - w * 32);
    warps[w].lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warps[w].arrived = warps[w].operations = warp_now[w] = 0;
  }
  for (bool progress = true; progress;) {
    progress = false;
    for (unsigned n = 0; n < thread_count; ++n) {
      const unsigned i = backwards ? thread_count - 1 - n : n;
      if (fibers[i].state != State::kReady) continue;
      progress = true;
      resume(i);
      if (error != cudaSuccess) return;
    }
  }
  for (unsigned i = 0; i < thread_count; ++i) {
    if (!copies[i].empty()) {
      error = cudaErrorLaunchFailure;
      error_text = "copy in flight: " + thread_name(i) + " has returned before its copies were done";
      return;
    }
    if (fibers[i].state == State::kExited) continue;
    const auto other = std::find_if(&fibers[0], &fibers[0] + thread_count,
                                    [&](const Fiber& fiber) { return fiber.state != fibers[i].state; });
    current = i;
    error = cudaErrorLaunchFailure;
    error_text = std::string("divergent ") + (fibers[i].state == State::kAtBarrier ? "barrier" : "warp operation") +
                 ": " + thread_name(i) + " waits at " + place_name(fibers[i].waits_at) + " for others, and " +
                 thread_name(unsigned(other - &fibers[0])) +
                 (other->state == State::kExited ? " has returned" : " waits at " + place_name(other->waits_at));
    return;
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  static std::mutex one_at_a_time;  // Python threads launch too
  const std::lock_guard lock(one_at_a_time);
  error = cudaSuccess;
  thread_count = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  if (thread_count == 0 || thread_count > kMaxThreads || config.gridDim.y != 1 || config.gridDim.z != 1) {
    error_text = "invalid configuration argument";
    return cudaErrorInvalidConfiguration;
  }
  make_fibers(thread_count);
  if (pages.size() > kMaxPages) pages.clear();
  kernel = &body;
  launch_began = now + 1;
  context.block_size = config.blockDim;
  context.grid_size = config.gridDim;
  // A device promises no order of blocks and warps: a result that depends on it differs from call to call here too.
  static std::minstd_rand order;
  backwards = order() >> 16 & 1;
  for (unsigned block = 0; block < config.gridDim.x && error == cudaSuccess; ++block) {
    context.block = dim3(backwards ? config.gridDim.x - 1 - block : block, 0, 0);
    run_block();
  }
  if (error != cudaSuccess) {  // the fibers are left in the middle of the kernel: they start anew
    for (Fiber& fiber : fibers) fiber.started = false;
    for (auto& left : copies) {
      for (const Copy& copy : left) set_copying(copy.to, false);
      left.clear();
    }
  }
  return error;
}

}  // namespace cuda_emulation

const char* cudaGetErrorString(cudaError_t) { return cuda_emulation::error_text.c_str(); }

// ---- what -fsanitize=thread calls ----

#define FASTNN_ACCESSES(size)                                                           \
  void __tsan_read##size(void* p) { cuda_emulation::access(p, size, false); }           \
  void __tsan_write##size(void* p) { cuda_emulation::access(p, size, true); }           \
  void __tsan_unaligned_read##size(void* p) { cuda_emulation::access(p, size, false); } \
  void __tsan_unaligned_write##size(void* p) { cuda_emulation::access(p, size, true); }

#pragma GCC visibility push(hidden)
extern "C" {
FASTNN_ACCESSES(1)
FASTNN_ACCESSES(2)
FASTNN_ACCESSES(4)
FASTNN_ACCESSES(8)
FASTNN_ACCESSES(16)
void __tsan_read_range(void* p, size_t size) { cuda_emulation::access(p, size, false); }
void __tsan_write_range(void* p, size_t size) { cuda_emulation::access(p, size, true); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
}
#pragma GCC visibility pop
