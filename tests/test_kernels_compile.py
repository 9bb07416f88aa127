"""NVRTC compiles every kernel that the GPU backend launches, for three generations of GPUs; no GPU is needed."""

import pytest

from ringsim.backends.cuda import Kernel
from ringsim.backends.cuda_sources import C_TYPES, compile_source, definitions, kernels, macros_of, names_of, text_of
from ringsim.errors import DeviceError

from .cubin import frames, sections

ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
KERNELS = kernels()
PROGRAMS = sorted({(kernel.source, kernel.types) for kernel in KERNELS})
# some spilled registers may be; an array of a thread's that went to the stack would be more
MOST_STACK_NBYTES = 128


@pytest.fixture(scope="module")
def _nvrtc():
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="NVRTC comes with CuPy, which is absent")


@pytest.mark.usefixtures("_nvrtc")
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("source", "types"), PROGRAMS, ids=lambda value: value if isinstance(value, str) else "-".join(type_ for _, type_ in value)
)
def test_every_variant_compiles_and_keeps_to_registers(source, types, arch):
    cubin = compile_source(source, types, arch)
    names = {kernel.name for kernel in KERNELS if (kernel.source, kernel.types) == (source, types)}
    assert names
    parts, stack = sections(cubin), frames(cubin)
    for name in names:
        assert f".text.{name}" in parts
        assert stack[name] <= MOST_STACK_NBYTES


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.name}-{'-'.join(type_ for _, type_ in kernel.types)}")
def test_a_kernel_is_where_it_says_and_gives_the_macros_that_are_asked_for(kernel):
    assert kernel.name in names_of(kernel.source)
    assert [macro for macro, _ in kernel.types] == list(macros_of(kernel.source))


def test_no_kernel_of_a_source_is_forgotten():
    for source in {kernel.source for kernel in KERNELS}:
        assert set(names_of(source)) == {kernel.name for kernel in KERNELS if kernel.source == source}
    assert len(set(KERNELS)) == len(KERNELS)


def test_a_source_brings_what_it_includes_once():
    text = text_of("finish.cu")
    assert "#include" not in text
    assert "#pragma once" not in text
    for name in ("common.cuh", "partials.cuh", "rows.cuh"):
        assert text.count(f'#line 1 "{name}"') == 1
    assert text.index('#line 1 "rows.cuh"') < text.index("struct Slot") < text.index("finish_rows")


def test_types_become_options():
    assert definitions((("STATE", "float64"), ("ELEMENT", "bfloat16"), ("COLUMNS", "8"))) == (
        "-DSTATE=double",
        "-DELEMENT=bf16_t",
        "-DCOLUMNS=8",
    )
    assert set(C_TYPES) == {"float64", "float32", "float16", "bfloat16"}


@pytest.mark.usefixtures("_nvrtc")
def test_an_error_shows_the_compilers_log_and_its_line():
    with pytest.raises(DeviceError, match=r"(?s)NVRTC: state.cu with {'STATE': 'nonsense'} for sm_90.*state.cu\(\d+\): error"):
        compile_source("state.cu", (("STATE", "nonsense"),), "sm_90")
    with pytest.raises(DeviceError, match="sm_1: "):
        compile_source("state.cu", (("STATE", "float32"),), "sm_1")


def test_a_source_that_is_missing_is_named():
    with pytest.raises(DeviceError, match=r"kernels/absent.cu is missing"):
        text_of("absent.cu")
    with pytest.raises(DeviceError, match="should say"):
        macros_of("rows.cuh")
    assert Kernel(source="absent.cu", name="absent") not in KERNELS
