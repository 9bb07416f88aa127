// Launching a kernel of the source above: its arguments' sizes, its blocks one after another, what went wrong.
#pragma once
#include <mutex>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

namespace on_cpu {

struct Order {
    unsigned grid[3], block[3], shared_nbytes, seed;
};

static std::mutex one_launch;
static unsigned char* shared_memory;

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
    const std::lock_guard<std::mutex> guard(one_launch);
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
    std::vector<unsigned char> shared(order.shared_nbytes + 2 * canary);
    shared_memory = shared.data() + (-reinterpret_cast<std::uintptr_t>(shared.data()) & 127);
    Call<A...> call{kernel, arguments};
    entry = Call<A...>::enter;
    entry_argument = &call;
    std::mt19937 random(order.seed);
    std::vector<unsigned> turns(thread_count), blocks(order.grid[0] * order.grid[1] * order.grid[2]);
    for (unsigned i = 0; i < turns.size(); ++i) turns[i] = i;
    for (unsigned i = 0; i < blocks.size(); ++i) blocks[i] = i;
    if (order.seed) std::shuffle(blocks.begin(), blocks.end(), random);
    for (const unsigned block : blocks) {
        block_index = {block % grid_dim.x, block / grid_dim.x % grid_dim.y, block / grid_dim.x / grid_dim.y};
        if (order.seed) std::shuffle(turns.begin(), turns.end(), random);
        std::memset(shared.data(), 0xff, shared.size());
        if (!run_block(turns.data())) return failure;
        for (const unsigned char* at = shared_memory + order.shared_nbytes; at < shared.data() + shared.size(); ++at)
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
