"""The emulator is right where the kernels lean on it, and says what a GPU would hide or turn into garbage."""

import ml_dtypes
import numpy as np
import pytest

from ringsim.backends.cuda import Launch
from ringsim.backends.cuda_sources import text_of

from .emulator import Canaries, compiled, needs_compiler, run

pytestmark = needs_compiler
COMMON = text_of("common.cuh")
ONE_WARP = Launch((1, 1, 1), (32, 1, 1))
KERNEL = 'extern "C" __global__ void k'


def play(source, shape, *arguments, seed=0):
    run(compiled(COMMON + f'#line 1 "test.cu"\n{source}', ("k",), ()), "k", shape, arguments, seed)


def floats(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_thread_knows_its_place(seed):
    seen = np.zeros((3, 2, 4, 2, 5, 6), np.int64)
    source = f"""{KERNEL}(long long* seen) {{
        const long long block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        const long long thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
        seen[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + thread + 1000 * block;
    }}"""
    play(source, Launch((4, 2, 3), (6, 5, 2)), seen, seed=seed)
    assert (seen.reshape(24, 60) == 1 + np.arange(60) + 1000 * np.arange(24)[:, None]).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffles(seed):
    made = np.zeros((5, 64), np.int32)
    source = f"""{KERNEL}(int* made) {{
        const int t = threadIdx.x, of = 64;
        made[t] = __shfl_xor_sync(ALL_LANES, 100 + t, 5);
        made[of + t] = __shfl_down_sync(ALL_LANES, 100 + t, 3);
        made[2 * of + t] = __shfl_up_sync(ALL_LANES, 100 + t, 1, 8);
        made[3 * of + t] = __shfl_sync(ALL_LANES, 100 + t, 11);
        made[4 * of + t] = t % 32 < 16 ? __shfl_xor_sync(0xffffu, t, 1) : -1;
    }}"""
    play(source, Launch((1, 1, 1), (64, 1, 1)), made, seed=seed)
    t = np.arange(64)
    lane, warp = t % 32, t // 32 * 32
    assert (made[0] == 100 + warp + (lane ^ 5)).all()
    assert (made[1] == 100 + np.where(lane < 29, t + 3, t)).all()
    assert (made[2] == 100 + np.where(lane % 8 > 0, t - 1, t)).all()
    assert (made[3] == 111 + warp).all()
    assert (made[4] == np.where(lane < 16, t ^ 1, -1)).all()


@pytest.mark.parametrize("seed", [0, 3])
def test_votes_sums_and_barriers(seed):
    made = np.zeros((6, 96), np.int32)
    source = f"""{KERNEL}(int* made) {{
        __shared__ int tile[96];
        const int t = threadIdx.x;
        made[t] = __ballot_sync(ALL_LANES, t % 3 == 0);
        made[96 + t] = __any_sync(ALL_LANES, t == 40) + 2 * __all_sync(ALL_LANES, t < 64);
        made[192 + t] = sum_over_lanes(t, 8) + 1000 * max_over_lanes(t, 32);
        for (int round = 0; round < 3; ++round) {{
            tile[t] = t + round;
            __syncthreads();
            made[288 + t] = tile[95 - t];
            made[384 + t] = __syncthreads_or(t == 7 * round) + 2 * __syncthreads_and(t >= 0);
            made[480 + t] = __syncthreads_count(t < 10 + round);
        }}
    }}"""
    play(source, Launch((1, 1, 1), (96, 1, 1)), made, seed=seed)
    t = np.arange(96)
    ballots = [sum(1 << (i % 32) for i in t[32 * w : 32 * w + 32] if i % 3 == 0) for w in range(3)]
    assert (made[0] == np.array(ballots, np.uint32).view(np.int32).repeat(32)).all()
    assert (made[1] == np.repeat([2, 3, 0], 32)).all()
    assert (made[2] == t.reshape(-1, 8).sum(1).repeat(8) + 1000 * (t // 32 * 32 + 31)).all()
    assert (made[3] == 97 - t).all()
    assert (made[4] == 3).all()
    assert (made[5] == 12).all()


@pytest.mark.parametrize(("name", "dtype"), [("half_t", np.float16), ("bf16_t", ml_dtypes.bfloat16)])
def test_tensor_cores(name, dtype):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((16, 16)).astype(dtype), rng.standard_normal((16, 8)).astype(dtype)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    expected = d + a.astype(np.float64) @ b.astype(np.float64)
    source = f"""{KERNEL}(const {name}* a, const {name}* b, float* d) {{
        const int g = threadIdx.x / 4, t = threadIdx.x % 4;
        const auto pair = [](auto x, auto y) {{ return x.bits | static_cast<unsigned>(y.bits) << 16; }};
        unsigned left[4], right[2];
        float sum[4];
        for (int i = 0; i < 4; ++i) {{
            const {name}* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
            left[i] = pair(at[0], at[1]);
            sum[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
        }}
        for (int i = 0; i < 2; ++i) right[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
        mma<{name}>(sum, left, right);
        for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
    }}"""
    play(source, ONE_WARP, a, b, d)
    np.testing.assert_allclose(d, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_matrices_reach_the_tensor_cores_from_shared_memory(seed):
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 16)).astype(np.float16)
    d = floats(16, 8)
    # a is read as its rows lie; of b (k, n) the columns 0 to 7, transposed on the way
    source = f"""{KERNEL}(const half_t* a, const half_t* b, float* d) {{
        DYNAMIC_SHARED(memory);
        half_t* const tile = reinterpret_cast<half_t*>(memory);
        const int lane = threadIdx.x, g = lane / 4, t = lane % 4, row = lane % 16, half = lane / 16;
        copy_async(tile + lane * 8, a + lane * 8);
        copy_async(tile + 256 + lane * 8, b + lane * 8);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        unsigned left[4], both[4];
        load_matrices<false>(left, tile + row * 16 + half * 8);
        load_matrices<true>(both, tile + 256 + row * 16 + half * 8);
        unsigned right[2] = {{both[0], both[1]}};
        float sum[4] = {{0, 0, 0, 0}};
        mma<half_t>(sum, left, right);
        for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
    }}"""
    canaries = Canaries()
    a, b = canaries.holding(a), canaries.holding(b)
    play(source, Launch((1, 1, 1), (32, 1, 1), 1024), a, b, d, seed=seed)
    np.testing.assert_allclose(d, a.astype(np.float64) @ b.astype(np.float64)[:, :8], rtol=0, atol=1e-5)


def test_copies_come_as_late_as_their_wait_allows():
    source = f"""{KERNEL}(const float* from, float* to) {{
        DYNAMIC_SHARED(memory);
        float* const tile = reinterpret_cast<float*>(memory);
        copy_async(tile, from);
        commit_copies();
        copy_async(tile + 4, from + 4);
        copy_async(tile + 8, from, false);
        commit_copies();
        wait_copies<1>();
        for (int i = 0; i < 12; ++i) to[i] = tile[i];
        wait_copies<0>();
        for (int i = 0; i < 12; ++i) to[12 + i] = tile[i];
    }}"""
    values, made = Canaries().holding(np.arange(8, dtype=np.float32)), floats(2, 12)
    play(source, Launch((1, 1, 1), (1, 1, 1), 48), values, made)
    assert (made[0, :4] == values[:4]).all()
    assert np.isnan(made[0, 4:]).all()
    assert (made[1] == [*values, 0, 0, 0, 0]).all()


def test_conversions_of_all_half_precision_numbers():
    bits = np.arange(2**16, dtype=np.uint16)
    made = floats(2, 2**16)
    back = np.zeros((2, 2**16), np.uint16)
    source = f"""{KERNEL}(const unsigned short* bits, float* made, unsigned short* back) {{
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        made[i] = to_float(half_t{{bits[i]}});
        made[65536 + i] = to_float(bf16_t{{bits[i]}});
        back[i] = from_float<half_t>(made[i]).bits;
        back[65536 + i] = from_float<bf16_t>(made[65536 + i]).bits;
    }}"""
    play(source, Launch((256, 1, 1), (256, 1, 1)), bits, made, back)
    for i, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
        wide = bits.view(dtype).astype(np.float32)
        np.testing.assert_array_equal(made[i], wide)
        number = ~np.isnan(wide)
        assert (back[i][number] == bits[number]).all()
        assert np.isnan(back[i][~number].view(dtype).astype(np.float32)).all()


def test_rounding_to_half_precision():
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)
    near = (rng.integers(0, 2**16, 2**16).astype(np.uint16).view(np.float16).astype(np.float32)).view(np.uint32)
    values = np.concatenate([values, (near + rng.integers(-4096, 4097, 2**16)).astype(np.uint32).view(np.float32)])
    made = np.zeros((2, values.size), np.uint16)
    source = f"""{KERNEL}(const float* values, unsigned short* made) {{
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        made[i] = from_float<half_t>(values[i]).bits;
        made[gridDim.x * blockDim.x + i] = from_float<bf16_t>(values[i]).bits;
    }}"""
    play(source, Launch((512, 1, 1), (256, 1, 1)), values, made)
    for i, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
        with np.errstate(over="ignore", invalid="ignore"):
            np.testing.assert_array_equal(made[i].view(dtype).astype(np.float32), values.astype(dtype).astype(np.float32))
