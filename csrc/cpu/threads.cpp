#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

#include "svf_cpu.h"

namespace t2cpu {
namespace {

// The ABI of GCC's OpenMP runtime, which LLVM's and Intel's have as well.
void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
void (*gomp_barrier)() = nullptr;
int (*thread_num)() = nullptr;
int (*num_threads)() = nullptr;
std::atomic<bool> forked{false};

template <class F>
bool look_up(void* library, const char* name, F*& f) {
  f = reinterpret_cast<F*>(dlsym(library, name));
  return f != nullptr;
}

struct Job {
  void (*f)(const Team&, void*);
  void* data;
};

void enter(void* job) {
  const Job& j = *static_cast<Job*>(job);
  j.f(Team{num_threads(), thread_num()}, j.data);
}

}  // namespace

bool find_threads(const char* path) {
  void* library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
  if (library == nullptr) return false;
  const bool found = look_up(library, "GOMP_barrier", gomp_barrier) && look_up(library, "omp_get_thread_num", thread_num) &&
                     look_up(library, "omp_get_num_threads", num_threads) && look_up(library, "GOMP_parallel", gomp_parallel);
  if (!found) gomp_parallel = nullptr;
  static const int once = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  return found && once == 0;
}

void Team::barrier() const {
  if (size > 1) gomp_barrier();
}

void parallel(int threads, void (*f)(const Team&, void*), void* data) {
  if (threads <= 1 || gomp_parallel == nullptr || forked) return f(Team{1, 0}, data);
  Job job{f, data};
  gomp_parallel(enter, &job, unsigned(threads), 0);
}

}  // namespace t2cpu
