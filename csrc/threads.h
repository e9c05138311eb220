// Threads that are started for one call and joined at its end. Starting them takes tens of microseconds, the work
// milliseconds; a thread pool would have to coexist with PyTorch's OpenMP threads and survive fork(). Waiting threads
// sleep rather than spin: another process on the machine costs only its share of the time.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace repirl {

// Runs `function(worker, n)` for workers 0 to n - 1 at the same time, worker 0 on the calling thread; n is num_workers,
// or fewer if the system cannot start that many threads. `function` must not throw.
template <class Function>
void run_workers(int num_workers, const Function &function) {
  std::mutex mutex;
  std::condition_variable counted;
  int num_running = 0;  // 0 until all threads are started
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(num_workers));
  try {
    for (int worker = 1; worker < num_workers; ++worker)
      threads.emplace_back([&, worker] {
        std::unique_lock<std::mutex> lock(mutex);
        counted.wait(lock, [&] { return num_running > 0; });
        const int num_all = num_running;
        lock.unlock();
        function(worker, num_all);
      });
  } catch (const std::system_error &) {  // go on with the threads that were started
  }
  {
    const std::lock_guard<std::mutex> lock(mutex);
    num_running = static_cast<int>(threads.size()) + 1;
  }
  counted.notify_all();
  function(0, static_cast<int>(threads.size()) + 1);
  for (std::thread &thread : threads) thread.join();
}

// Phases of tasks, one after the other. Within a phase, a worker takes the next task as soon as it is free.
class Phases {
 public:
  // Every one of the `num_workers` workers calls this with the same number of tasks. Returns when all tasks are done.
  template <class Function>
  void run(int num_workers, int64_t num_tasks, const Function &task) {
    for (int64_t index = next_++; index < num_tasks; index = next_++) task(index);
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t phase = phase_;
    if (++num_arrived_ == num_workers) {
      num_arrived_ = 0;
      next_ = 0;
      ++phase_;
      all_arrived_.notify_all();
    } else {
      all_arrived_.wait(lock, [&] { return phase_ != phase; });
    }
  }

 private:
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::condition_variable all_arrived_;
  int num_arrived_ = 0;
  int64_t phase_ = 0;
};

}  // namespace repirl
