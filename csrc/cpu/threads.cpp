#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

#include "svf_cpu.h"

namespace t2cpu {
namespace {

// GCC's OpenMP runtime; LLVM's and Intel's have it as well.
void (*gomp_parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
std::atomic<bool> forked{false};

}  // namespace

bool find_threads(const char* path) {
  void* library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return false;
  gomp_parallel = reinterpret_cast<decltype(gomp_parallel)>(dlsym(library, "GOMP_parallel"));
  static const int failed = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return gomp_parallel != nullptr && !failed;
}

void parallel(int threads, void (*f)(void*), void* data) {
  if (threads <= 1 || gomp_parallel == nullptr || forked) return f(data);
  gomp_parallel(f, data, unsigned(threads), 0);
}

}  // namespace t2cpu
