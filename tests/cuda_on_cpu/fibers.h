// A block of CUDA threads on one CPU thread: each is a fiber that runs until it has to wait for others.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x, y, z;
};

namespace on_cpu {

constexpr unsigned MOST_THREADS = 1024, WARP = 32, MOST_COPIES = 256;
constexpr std::size_t STACK = 256 * 1024;

struct Site {
    const char* file;
    int line;
    bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
};

using Exchange = void (*)(void** operands, unsigned mask);

enum class At { ready, barrier, warp, end };

struct Copy {
    void* to;
    const void* from;
    unsigned group;
    bool inside;
};

struct Thread {
    dim3 index;
    unsigned number;
    At at;
    Site site;
    Exchange exchange;  // what a warp does together
    unsigned mask;
    void* operand;
    Copy copies[MOST_COPIES];
    unsigned copies_begin, copies_end, groups;
#if defined(__x86_64__)
    void* stack_pointer;
#else
    ucontext_t context;
#endif
};

// one launch at a time: `launch` holds a lock
static Thread threads[MOST_THREADS];
static Thread* current;
static unsigned thread_count;
static char failure[512];
static char* stacks;
static void (*entry)(void*);
static void* entry_argument;
static dim3 block_index, block_dim, grid_dim;
static unsigned votes_given, votes_read;  // at __syncthreads_or and its like

// ---- switching

#if defined(__x86_64__)
extern "C" void on_cpu_switch(void** save, void* load);
asm(".text\n.local on_cpu_switch\n.type on_cpu_switch, @function\non_cpu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
static void* scheduler_pointer;
static inline void leave() { on_cpu_switch(&current->stack_pointer, scheduler_pointer); }
static inline void enter(Thread& thread) { on_cpu_switch(&scheduler_pointer, thread.stack_pointer); }
#else
static ucontext_t scheduler_context;
static inline void leave() { swapcontext(&current->context, &scheduler_context); }
static inline void enter(Thread& thread) { swapcontext(&scheduler_context, &thread.context); }
#endif

template <class... A> [[noreturn]] static void fail(const char* format, A... values) {
    if (!failure[0]) std::snprintf(failure, sizeof failure, format, values...);
    for (;;) leave();
}

static void run_thread() {
    entry(entry_argument);
    current->at = At::end;
    for (;;) leave();
}

static void prepare(Thread& thread) {
    char* const top = stacks + (thread.number + 1) * STACK;
#if defined(__x86_64__)
    void** frame = reinterpret_cast<void**>(top) - 1;
    *frame = nullptr;  // where run_thread would return to; the stack is aligned as after a call
    *--frame = reinterpret_cast<void*>(run_thread);
    thread.stack_pointer = frame - 6;
    std::memset(thread.stack_pointer, 0, 6 * sizeof(void*));
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = top - STACK;
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, run_thread, 0);
#endif
    thread.at = At::ready;
    thread.copies_begin = thread.copies_end = thread.groups = 0;
}

// ---- waiting

static void barrier(Site site) {
    current->at = At::barrier;
    current->site = site;
    leave();
}

// Waits until every lane of `mask` is here too; the last one to come exchanges the operands of all.
static void together(Site site, Exchange exchange, unsigned mask, void* operand) {
    Thread* const warp = threads + current->number / WARP * WARP;
    if (!(mask >> current->number % WARP & 1))
        fail("thread %u at %s:%d is not in its own mask %#x", current->number, site.file, site.line, mask);
    current->at = At::warp;
    current->site = site;
    current->exchange = exchange;
    current->mask = mask;
    current->operand = operand;
    void* operands[WARP] = {};
    for (unsigned lane = 0; lane < WARP; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const Thread& peer = warp[lane];
        const bool here = peer.number < thread_count && peer.at == At::warp && peer.exchange == exchange && peer.mask == mask &&
                          peer.site == site;
        if (!here) return leave();
        operands[lane] = peer.operand;
    }
    exchange(operands, mask);
    for (unsigned lane = 0; lane < WARP; ++lane)
        if (mask >> lane & 1) warp[lane].at = At::ready;
}

// ---- one block

static void describe(const Thread& thread, char* text, std::size_t size) {
    const char* const what = thread.at == At::barrier ? "at the barrier" : "for its warp";
    if (thread.at == At::end) std::snprintf(text, size, "thread %u has ended", thread.number);
    else std::snprintf(text, size, "thread %u waits %s of %s:%d", thread.number, what, thread.site.file, thread.site.line);
}

static bool same_place(const Thread& a, const Thread& b) { return a.at == b.at && (a.at == At::end || a.site == b.site); }

// Says who waits for whom: a thread that waits, and one elsewhere, of the same warp if there is one.
static void complain() {
    const Thread* stuck = threads;
    while (stuck->at == At::end) ++stuck;
    const unsigned first = stuck->number / WARP * WARP;
    char mine[160], theirs[160] = "no other comes";
    describe(*stuck, mine, sizeof mine);
    for (unsigned i = 0; i < thread_count; ++i) {
        const Thread& other = threads[(first + i) % thread_count];
        if (same_place(*stuck, other)) continue;
        describe(other, theirs, sizeof theirs);
        break;
    }
    std::snprintf(failure, sizeof failure, "block (%u, %u, %u) diverges: %s, while %s", block_index.x, block_index.y,
                  block_index.z, mine, theirs);
}

// Lets all go on that wait at the same barrier; false if they do not.
static bool release() {
    for (unsigned i = 0; i < thread_count; ++i) {
        if (threads[i].at == At::barrier && threads[i].site == threads[0].site) continue;
        complain();
        return false;
    }
    for (unsigned i = 0; i < thread_count; ++i) threads[i].at = At::ready;
    return true;
}

static bool run_block(const unsigned* order) {
    votes_given = votes_read = 0;
    for (unsigned i = 0; i < thread_count; ++i) prepare(threads[i]);
    for (;;) {
        bool progress = false, all_ended = true;
        for (unsigned i = 0; i < thread_count; ++i) {
            Thread& thread = threads[order[i]];
            if (thread.at == At::ready) {
                current = &thread;
                enter(thread);
                progress = true;
                if (failure[0]) return false;
            }
            all_ended = all_ended && thread.at == At::end;
        }
        if (all_ended) return true;
        if (!progress && !release()) return false;
    }
}

}  // namespace on_cpu
