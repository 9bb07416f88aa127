// Launching a kernel of the source above: its arguments' sizes, its blocks one after another, what went wrong.
#pragma once
#include <cstdlib>
#include <pthread.h>
#include <type_traits>
#include <utility>

namespace on_cpu {

struct Order {
    unsigned grid[3], block[3], shared_nbytes, seed;
};

static pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;
static unsigned char* shared_memory;

struct Locked {
    Locked() { pthread_mutex_lock(&one_launch); }
    ~Locked() { pthread_mutex_unlock(&one_launch); }
};

// memory that is freed with its name
template <class T> struct Held {
    T* data;
    explicit Held(std::size_t count) : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {}
    ~Held() { std::free(data); }
};

// The numbers below `count`, mixed where there is a seed.
static void draw(unsigned* to, unsigned count, unsigned seed, std::uint64_t& state) {
    for (unsigned i = 0; i < count; ++i) to[i] = i;
    if (!seed) return;
    for (unsigned i = count; i > 1; --i) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;  // Knuth's MMIX
        std::swap(to[i - 1], to[(state >> 33) % i]);
    }
}

static inline unsigned char* dynamic_shared() { return shared_memory; }

// A kernel's parameters as text: p, i, f or s (a struct) and a size, for each.
template <class... A> const char* describe_parameters(void (*)(A...)) {
    static char text[4096];
    char* at = text;
    *at = 0;
    (void)std::initializer_list<int>{(at += std::sprintf(at, "%c%zu ",
                                                         std::is_pointer<A>::value          ? 'p'
                                                         : std::is_integral<A>::value       ? 'i'
                                                         : std::is_floating_point<A>::value ? 'f'
                                                                                            : 's',
                                                         sizeof(A)),
                                      0)...};
    return text;
}

template <class... A> struct Call {
    void (*kernel)(A...);
    void** arguments;
    template <std::size_t... I> void run(std::index_sequence<I...>) const {
        kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
    }
    static void enter(void* self) { static_cast<Call*>(self)->run(std::index_sequence_for<A...>{}); }
};

static void number_threads(const Order& order) {
    thread_count = order.block[0] * order.block[1] * order.block[2];
    for (unsigned i = 0; i < MOST_THREADS; ++i) {
        threads[i].number = i;
        threads[i].index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
    }
}

// Empty if all went well, else what did not. With a seed that is not 0, blocks and threads run in an order drawn by it.
template <class... A> const char* launch(void (*kernel)(A...), void** arguments, const Order& order) {
    const Locked locked;
    constexpr unsigned canary = 256;
    failure[0] = 0;
    grid_dim = {order.grid[0], order.grid[1], order.grid[2]};
    block_dim = {order.block[0], order.block[1], order.block[2]};
    number_threads(order);
    if (!stacks) {
        void* const made = mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (made == MAP_FAILED) return "no memory for stacks";
        stacks = static_cast<char*>(made);
    }
    const Held<unsigned char> shared(order.shared_nbytes + 2 * canary);
    unsigned char* const shared_end = shared.data + order.shared_nbytes + 2 * canary;
    shared_memory = shared.data + (-reinterpret_cast<std::uintptr_t>(shared.data) & 127);
    Call<A...> call{kernel, arguments};
    entry = Call<A...>::enter;
    entry_argument = &call;
    const unsigned block_count = order.grid[0] * order.grid[1] * order.grid[2];
    const Held<unsigned> turns(thread_count), blocks(block_count);
    std::uint64_t state = order.seed;
    draw(blocks.data, block_count, order.seed, state);
    for (unsigned i = 0; i < block_count; ++i) {
        const unsigned block = blocks.data[i];
        block_index = {block % grid_dim.x, block / grid_dim.x % grid_dim.y, block / grid_dim.x / grid_dim.y};
        draw(turns.data, thread_count, order.seed, state);
        std::memset(shared.data, 0xff, shared_end - shared.data);
        if (!run_block(turns.data)) return failure;
        for (const unsigned char* at = shared_memory + order.shared_nbytes; at < shared_end; ++at)
            if (*at != 0xff) return "a thread wrote beyond the block's dynamic shared memory";
    }
    return "";
}

struct Where {
    const char* file;
    std::uint32_t line, column;
};

struct Mismatch {
    Where where;
    const void* type;
    unsigned char log_alignment, kind;
};

}  // namespace on_cpu

// g++ -fsanitize=alignment,bounds calls these; there is no libubsan
extern "C" void __ubsan_handle_type_mismatch_v1(void* data, void* address) {
    const auto& what = *static_cast<on_cpu::Mismatch*>(data);
    on_cpu::fail("%s:%u: thread %u loads or stores %p, not aligned to %u bytes", what.where.file, what.where.line,
                 on_cpu::current->number, address, 1u << what.log_alignment);
}

extern "C" void __ubsan_handle_out_of_bounds(void* data, void* index) {
    const auto& where = *static_cast<on_cpu::Where*>(data);
    on_cpu::fail("%s:%u: thread %u uses element %zd of an array that has fewer", where.file, where.line,
                 on_cpu::current->number, reinterpret_cast<std::ptrdiff_t>(index));
}

#define ON_CPU_KERNEL(name)                                                                                    \
    extern "C" const char* describe_##name() { return on_cpu::describe_parameters(name); }                     \
    extern "C" const char* launch_##name(void** arguments, const on_cpu::Order* order) {                       \
        return on_cpu::launch(name, arguments, *order);                                                        \
    }
