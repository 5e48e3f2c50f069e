#include "pool.h"

#if defined(__linux__)
#include <sched.h>
#endif
#include <unistd.h>

#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitnet {

namespace {

// Tries before a thread sleeps; each takes as long as `pause`, 20 to 40 ns. Between two jobs that is 0.1 to 0.3 ms: longer
// than sampling takes between two tokens, and too short to cost anything when idle. At a barrier it is a tenth of that:
// threads arrive within microseconds, unless another program runs on the core of one of them, which then needs this one.
constexpr int kJobSpins = 8000, kBarrierSpins = 800;

void wait_while(const std::atomic<uint32_t>& value, uint32_t old, int spins) {
    for (int i = 0; i < spins; i++) {
        if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
        _mm_pause();
#endif
    }
    while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

// CPUs the scheduler may put this process on; a cpu_set_t holds 1,024 of them, which is also kMaxThreads.
int cores() {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned known = std::thread::hardware_concurrency();
    return known ? (int)known : kMaxThreads;
}

}  // namespace

Pool::Pool(int threads) : threads_(threads), process_(getpid()) {
    if (threads < 1 || threads > kMaxThreads)
        throw std::invalid_argument("threads: got " + std::to_string(threads) + ", expected 1 to " +
                                    std::to_string(kMaxThreads));
    start();
}

void Pool::start() {
    // With more threads than cores, a thread that spins blocks the one it waits for: sleep at once.
    const bool crowded = threads_ > cores();
    job_spins_ = crowded ? 0 : kJobSpins, barrier_spins_ = crowded ? 0 : kBarrierSpins;
    try {
        workers_.reserve((size_t)threads_ - 1);
        for (int t = 1; t < threads_; t++) workers_.emplace_back(&Pool::serve, this, t, job_.load());
    } catch (const std::system_error& error) {
        const size_t running = workers_.size() + 1;
        stop();  // the destructor does not run: join those that did start
        throw std::invalid_argument("threads: got " + std::to_string(threads_) + ", expected at most the " +
                                    std::to_string(running) + " that the system let this process have (" +
                                    error.code().message() + "); ask for fewer, or raise its limit of processes or " +
                                    "memory (ulimit -u, ulimit -v, or the container's)");
    } catch (...) {
        stop();
        throw;
    }
}

void Pool::stop() {
    stopping_.store(true);
    job_.fetch_add(1, std::memory_order_release);
    job_.notify_all();
    for (auto& worker : workers_) worker.join();
    workers_.clear();
    stopping_.store(false);
}

// After a fork the handles are those of the parent's threads. They can be neither joined nor detached here, and may by now
// stand for other threads: leak them.
void Pool::abandon_workers() {
    new std::vector<std::thread>(std::move(workers_));
    workers_.clear();
}

Pool::~Pool() {
    if (process_ != getpid()) {  // a forked child has no workers to wait for
        abandon_workers();
        return;
    }
    stop();
}

void Pool::serve(int thread, uint32_t seen) {
    for (;;) {
        wait_while(job_, seen, job_spins_);
        seen++;
        if (stopping_.load()) return;
        Team team(*this, thread, threads_);
        (*work_)(team);
        team.barrier();
    }
}

void Pool::run(const std::function<void(Team&)>& work) {
    Team team(*this, 0, threads_);
    if (threads_ > 1) {
        if (process_ != getpid()) {
            abandon_workers();
            count_ = 0;
            start();
            process_ = getpid();
        }
        work_ = &work;
        job_.fetch_add(1, std::memory_order_release);
        job_.notify_all();
    }
    work(team);
    team.barrier();
}

void Team::barrier() {
    if (threads == 1) return;
    pool_.arrive(pool_.phase_, pool_.count_);
}

void Pool::arrive(std::atomic<uint32_t>& phase, std::atomic<uint32_t>& count) {
    const uint32_t now = phase.load(std::memory_order_relaxed);
    if (count.fetch_add(1, std::memory_order_acq_rel) + 1 == (uint32_t)threads_) {
        count.store(0, std::memory_order_relaxed);
        phase.store(now + 1, std::memory_order_release);
        phase.notify_all();
    } else {
        wait_while(phase, now, barrier_spins_);
    }
}

}  // namespace bitnet
