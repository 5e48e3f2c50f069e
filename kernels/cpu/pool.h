// Threads that stay: a fixed team that runs one function together and meets at barriers inside it.
//
// Waiting spins for a moment and then sleeps: inside a forward pass a barrier is crossed every few microseconds, and
// between two tokens there is only the sampling; but an idle engine must not hold a core. Where there are more threads
// than cores nobody spins. Work is cut into static ranges
// by thread number, so that nothing but the number of threads decides who computes what.

#pragma once

#include <stdint.h>

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

namespace bitnet {

class Pool;

constexpr int kMaxThreads = 1024;  // more than any machine has cores; each costs a stack and scratch memory

// One thread's view of a running team.
class Team {
  public:
    Team(Pool& pool, int thread, int threads) : thread(thread), threads(threads), pool_(pool) {}

    // Every thread of the team has to pass here before any goes on.
    void barrier();

    // This thread's part [begin, end) of n items.
    int64_t begin(int64_t n) const { return n * thread / threads; }
    int64_t end(int64_t n) const { return n * (thread + 1) / threads; }

    const int thread, threads;

  private:
    Pool& pool_;
};

class Pool {
  public:
    // `threads`: 1 to kMaxThreads, the caller of `run` being one of them. Throws std::invalid_argument for others, and
    // where the system starts fewer; those that did start have then ended.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // Run `work` on every thread and return when all have. Not for two callers at once, and `work` must not throw.
    void run(const std::function<void(Team&)>& work);

    int threads() const { return threads_; }

  private:
    friend class Team;
    void start();
    void end();
    void forget();
    void serve(int thread, uint32_t seen);
    void arrive(std::atomic<uint32_t>& phase, std::atomic<uint32_t>& count);

    int threads_;
    int job_spins_ = 0, barrier_spins_ = 0;  // tries before a thread sleeps
    int process_;  // workers do not survive a fork: the child starts its own
    std::vector<std::thread> workers_;
    const std::function<void(Team&)>* work_ = nullptr;
    alignas(64) std::atomic<uint32_t> job_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<uint32_t> count_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace bitnet
