"""What a GPU would hide or turn into garbage, the emulator says."""

import numpy as np
import pytest

from ringsim.backends.cuda import Kernel, Launch
from ringsim.backends.cuda_strides import record

from .emulator import Canaries, EmulationError, Emulator, needs_compiler
from .test_emulator import KERNEL, ONE_WARP, floats, play

pytestmark = needs_compiler


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 40) __syncthreads();", r"thread 0 waits at the barrier of test.cu:1, while thread 40 has ended"),
        (
            "if (threadIdx.x % 2) __syncthreads();\n else\n __syncthreads();",
            r"thread 0 waits at the barrier of test.cu:3, while thread 1 waits at the barrier of test.cu:1",
        ),
        ("if (threadIdx.x > 2) __syncwarp();", "thread 3 waits for its warp of test.cu:1, while thread 0 has ended"),
        (
            "if (threadIdx.x != 33) __shfl_xor_sync(ALL_LANES, 1, 1);",
            "waits for its warp of test.cu:1, while thread 33 has ended",
        ),
        ("if (threadIdx.x % 32 < 8) __syncwarp(0xfffu);", "diverges"),
        ("__syncwarp(0xfffeu);", "thread 0 at test.cu:1 is not in its own mask 0xfffe"),
        ("if (threadIdx.x / 32) __syncthreads(); else __syncwarp();", "diverges"),
    ],
)
def test_threads_that_part_ways(body, message):
    with pytest.raises(EmulationError, match=message):
        play(f"{KERNEL}() {{ {body} }}", Launch((1, 1, 1), (64, 1, 1)))


def test_a_warp_that_is_not_whole():
    with pytest.raises(EmulationError, match="diverges"):
        play(f"{KERNEL}() {{ __syncwarp(); }}", Launch((1, 1, 1), (16, 1, 1)))


def test_a_missing_barrier_shows():
    source = f"""{KERNEL}(float* made) {{
        DYNAMIC_SHARED(memory);
        float* const tile = reinterpret_cast<float*>(memory);
        tile[threadIdx.x] = 1;
        made[threadIdx.x] = tile[threadIdx.x ^ 1];
    }}"""
    made = floats(32)
    play(source, Launch((1, 1, 1), (32, 1, 1), 128), made)
    assert np.isnan(made).any()


def test_blocks_that_lean_on_one_another_show():
    source = f"{KERNEL}(int* made) {{ made[blockIdx.x] = made[max(0, (int)blockIdx.x - 1)] + 1; }}"
    found = set()
    for seed in range(4):
        made = np.zeros(16, np.int32)
        play(source, Launch((16, 1, 1), (1, 1, 1)), made, seed=seed)
        found.add(tuple(made))
    assert len(found) > 1


def test_loads_that_are_not_aligned():
    memory = Canaries().array((64,), np.float32, fill=0)
    source = f"{KERNEL}(const float* from, float* to) {{ float four[4]; load(four, from); store(to, four); }}"
    play(source, Launch((1, 1, 1), (1, 1, 1)), memory[4:], memory[8:])
    with pytest.raises(EmulationError, match=r"common.cuh:\d+: thread 0 .* not aligned to 16 bytes"):
        play(source, Launch((1, 1, 1), (1, 1, 1)), memory[5:], memory[8:])
    with pytest.raises(EmulationError, match="copy_async: thread 0"):
        play(
            f"{KERNEL}(const float* from) {{ DYNAMIC_SHARED(tile); copy_async(tile, from); }}",
            ONE_WARP._replace(shared_nbytes=16),
            memory[1:],
        )
    with pytest.raises(EmulationError, match="load_matrices: thread 0"):
        source = f"{KERNEL}(const float* from) {{ unsigned to[4]; load_matrices<false>(to, from + 1); }}"
        play(source, ONE_WARP, memory)


def test_indices_beyond_an_array():
    source = f"{KERNEL}(int* made, int at) {{ int few[4] = {{1, 2, 3, 4}}; few[at] = 5; made[0] = few[1] + few[at & 3]; }}"
    made = np.zeros(1, np.int32)
    play(source, Launch((1, 1, 1), (1, 1, 1)), made, np.int32(1))
    assert made[0] == 10
    with pytest.raises(EmulationError, match=r"test.cu:1: thread 0 uses element 4 of an array"):
        play(source, Launch((1, 1, 1), (1, 1, 1)), made, np.int32(4))


def test_shared_memory_ends():
    source = f"{KERNEL}(int at) {{ DYNAMIC_SHARED(tile); tile[at] = 1; }}"
    play(source, Launch((1, 1, 1), (1, 1, 1), 100), np.int32(99))
    with pytest.raises(EmulationError, match="beyond the block's dynamic shared memory"):
        play(source, Launch((1, 1, 1), (1, 1, 1), 100), np.int32(100))


def test_canaries():
    canaries = Canaries()
    made = canaries.array((3, 4), np.float16, offset=2, axes=(1, 0))
    assert made.ctypes.data % 256 == 2
    assert made.strides == (2, 6)
    canaries.check()
    source = f"{KERNEL}(half_t* made, int at) {{ made[at] = {{1}}; }}"
    play(source, Launch((1, 1, 1), (1, 1, 1)), made, np.int32(12))
    with pytest.raises(AssertionError, match="beside"):
        canaries.check()


def test_canaries_between_elements():
    canaries = Canaries()
    made = canaries.holding(np.arange(12.0).reshape(3, 4), pad=1)
    assert made.strides == (40, 8)
    canaries.check()
    source = f"{KERNEL}(double* made, int at) {{ made[at] = 1; }}"
    play(source, ONE_WARP, made, np.int32(5))
    canaries.check()
    play(source, ONE_WARP, made, np.int32(4))
    with pytest.raises(AssertionError, match="beside"):
        canaries.check()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ((floats(1), np.int32(1), record([1])), "p8 i4 s8"),
        ((floats(1), np.int64(1), np.float64(1)), "p8 i8 f8"),
        ((floats(1), np.int64(1)), "p8 i8"),
        ((np.int64(0), np.int64(1), record([1])), "i8 i8 s8"),
    ],
)
def test_arguments_that_are_not_the_kernels(arguments, found):
    source = f"struct Number {{ long long value; }};\n{KERNEL}(float* made, long long n, Number word) "
    source += "{ if (made) made[0] = n + word.value; }"
    made = floats(1)
    play(source, ONE_WARP, made, np.int64(4), record([5]))
    play(source, ONE_WARP, None, np.int64(4), record([5]))
    assert made[0] == 9
    with pytest.raises(EmulationError, match=rf"k: takes p8 i8 s8 .* given {found}$"):
        play(source, ONE_WARP, *arguments)


@pytest.mark.parametrize(
    "shape",
    [
        Launch((1, 1, 1), (1024, 2, 1)),
        Launch((1, 65536, 1), (1, 1, 1)),
        Launch((0, 1, 1), (1, 1, 1)),
        Launch((1, 1, 1), (1, 1, 1), 2**18),
    ],
)
def test_shapes_that_no_gpu_launches(shape):
    with pytest.raises(EmulationError, match="k: "):
        play(f"{KERNEL}() {{}}", shape)


def test_a_kernel_is_launched_by_its_name():
    emulator, target = Emulator(), np.full(4, 9, np.uint64)
    kernel = Kernel(source="copies.cu", name="clear", types=(("UNIT", "8"),))
    emulator.launch(kernel, ONE_WARP, (record([1, 1, 1, 3, 0, 0, 0, 1, 0, 0, 0, 1]), target))
    assert target.tolist() == [0, 0, 0, 9]
    assert emulator.launches == 1
