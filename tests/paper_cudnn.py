"""cuDNN on paper: as much of the frontend's module as ringsim calls, computed by NumPy on the addresses that it is given.

What it takes, what it refuses and where it rounds are cuDNN's: `sdpa_support_surface.h`, `scaled_dot_product_flash_attention.h`
and `attn_score_modifiers.h` of frontend 1.32.
"""

import ctypes
import enum

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided


class data_type(enum.Enum):  # noqa: N801 - the module's own names
    HALF = np.dtype(np.float16)
    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
    FLOAT = np.dtype(np.float32)


class diagonal_alignment(enum.Enum):  # noqa: N801
    TOP_LEFT = 0
    BOTTOM_RIGHT = 1


class heur_mode(enum.Enum):  # noqa: N801
    A = 0
    FALLBACK = 1


class cudnnGraphNotSupportedError(Exception):  # noqa: N801
    pass


class PaperCudnn:
    """Stands for the module: ``monkeypatch.setitem(sys.modules, "cudnn", PaperCudnn(defer=gpu.defer))``.

    `defer(function, stream)` runs what `execute` launches, or queues it; the stream is what `set_stream` was last given.
    `engines` are the plans of each graph, of which those in `broken` cannot be built.
    """

    data_type, diagonal_alignment, heur_mode = data_type, diagonal_alignment, heur_mode
    cudnnGraphNotSupportedError = cudnnGraphNotSupportedError  # noqa: N815
    __version__ = "1.32.0"

    def __init__(
        self, *, defer=None, version=92800, capability=(9, 0), engines=("sdpa_fwd_prefill_sm90", "eng9", "eng8"), broken=()
    ):
        self.defer = defer or (lambda function, stream: function())
        self.version, self.capability, self.engines, self.broken = version, capability, engines, broken
        self.log = []
        self.graphs = []

    def backend_version(self):
        if self.version is None:
            raise RuntimeError("Unable to find symbol cudnnGetVersion")
        return self.version

    def create_handle(self):
        made = Handle()
        self.log.append(("create_handle", made))
        return made

    def destroy_handle(self, handle):
        self.log.append(("destroy_handle", handle))

    def set_stream(self, handle, stream):
        self.log.append(("set_stream", stream))
        handle.stream = stream

    def pygraph(self, **options):
        graph = Graph(self, **options)
        self.graphs.append(graph)
        return graph


class Handle:
    stream = None


class Tensor:
    def __init__(self, uid=None, dim=None, stride=None, data_type=None):
        self.uid, self.dim, self.stride, self.kind, self.output = uid, dim, stride, data_type, False

    def set_uid(self, uid):
        self.uid = uid
        return self

    def set_output(self, output):
        self.output = output
        return self

    def set_dim(self, dim):
        self.dim = tuple(dim)
        return self

    def set_stride(self, stride):
        self.stride = tuple(stride)
        return self

    def set_data_type(self, kind):
        self.kind = kind
        return self

    def at(self, address):
        """The array that lies there."""
        last = sum((size - 1) * stride for size, stride in zip(self.dim, self.stride, strict=True))
        itemsize = self.kind.value.itemsize
        flat = np.frombuffer((ctypes.c_char * ((last + 1) * itemsize)).from_address(address), np.uint8).view(self.kind.value)
        return as_strided(flat, self.dim, [stride * itemsize for stride in self.stride], writeable=True)


class Graph:
    def __init__(self, module, *, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert intermediate_data_type is compute_data_type is data_type.FLOAT
        self.module, self.io, self.handle = module, io_data_type, handle
        self.step, self.plan, self.backward = None, None, False

    def tensor(self, *, name, uid, dim, stride, data_type):
        assert len(dim) == len(stride) == 4, name
        return Tensor(uid, tuple(dim), tuple(stride), data_type)

    def sdpa(self, *, name, q, k, v, generate_stats, attn_scale, **band):
        assert generate_stats is True, name
        self.ports, self.scale = {"q": q, "k": k, "v": v, "o": Tensor(), "stats": Tensor()}, attn_scale
        self._set_band(**band)
        return [self.ports["o"], self.ports["stats"]]

    def sdpa_backward(self, *, name, q, k, v, o, dO, stats, attn_scale, use_deterministic_algorithm, **band):
        self.ports = {"q": q, "k": k, "v": v, "o": o, "dO": dO, "stats": stats, "dQ": Tensor(), "dK": Tensor(), "dV": Tensor()}
        self.scale, self.backward, self.deterministic = attn_scale, True, use_deterministic_algorithm
        self._set_band(**band)
        return [self.ports["dQ"], self.ports["dK"], self.ports["dV"]]

    def _set_band(self, *, diagonal_alignment, diagonal_band_left_bound=None, diagonal_band_right_bound=None):
        self.alignment, self.left, self.right = diagonal_alignment, diagonal_band_left_bound, diagonal_band_right_bound

    # what cuDNN refuses

    def validate(self):
        """Raises what the frontend raises."""
        (_, heads, rows, width), (_, kv_heads, keys, _) = self.ports["q"].dim, self.ports["k"].dim
        v_width = self.ports["v"].dim[3]
        for name, tensor in self.ports.items():
            if tensor.dim is None or tensor.stride is None or tensor.stride[3] != 1:
                raise ValueError(f"The dim or stride for {name} is invalid")
            self._check_alignment(name, tensor)
        self._refuse(heads % kv_heads, "number of heads for key and query must be a factor of number of heads for query")
        self._refuse(width % 8 or v_width % 8, "hidden_dim should be multiple of 8")
        if self.left is not None and self.left <= 0:
            raise ValueError("Left bound (Sliding window length) should be greater than zero when set.")
        if self.right is not None and self.right < 0:
            raise ValueError("Right bound needs to be larger than or equal to zero")
        self._refuse(
            self.left is not None and rows > keys, "Sliding window attention is only supported with max_s_q <= max_s_kv."
        )
        if self.backward:
            self._refuse(rows == keys == 1, "s_q = s_kv = 1 is not supported.")
            most = 256 if self.module.capability[0] == 9 else 128
            special = self.module.capability[0] == 10 and (width, v_width) in ((192, 128), (256, 256))
            self._refuse(max(width, v_width) > most and not special, f"Num hidden_dim should be less than or equal to {most}")
            (_, heads, rows, _), stats = self.ports["q"].dim, self.ports["stats"].stride
            packed = stats == (heads * rows, rows, 1, 1)
            self._refuse(self.module.version < 92600 and not packed, "a non-ragged Stats input must be a packed BHSD tensor.")
        self.step = "validated"

    def _refuse(self, whether, message):
        if whether:
            raise cudnnGraphNotSupportedError(message)

    def _check_alignment(self, name, tensor):
        kind = data_type.FLOAT if name == "stats" else self.io
        assert tensor.kind is kind, (name, tensor.kind)
        if name != "stats":
            steps = [stride * 2 for stride, size in zip(tensor.stride[:3], tensor.dim[:3], strict=True) if size > 1]
            self._refuse(
                any(step % 16 for step in steps), f"{name}: a stride is not a multiple of the tensor's 16-byte alignment"
            )

    # plans

    def build_operation_graph(self):
        assert self.step == "validated"
        self.step = "operations"

    def create_execution_plans(self, modes):
        assert self.step == "operations" and modes == [heur_mode.A, heur_mode.FALLBACK]
        self.step = "planned"

    def get_execution_plan_count(self):
        return len(self.module.engines)

    def get_plan_name_at_index(self, index):
        return self.module.engines[index]

    def build_plan_at_index(self, index):
        assert self.step == "planned"
        self._refuse(self.module.engines[index] in self.module.broken, "cudnnFinalize Descriptor Failed")
        self.plan = index

    def get_workspace_size_plan_at_index(self, index):
        assert index == self.plan
        if not self.backward:
            return 256
        (batch, heads, rows, width), keys = self.ports["q"].dim, self.ports["k"].dim[2]
        return 256 + batch * heads * (rows * 4 * (width + 1) + -(-rows // 64) * 64 * -(-keys // 128) * 128 * 2)

    def execute(self, pack, workspace, handle):
        assert handle is self.handle and self.plan is not None
        assert sorted(pack) == sorted(tensor.uid for tensor in self.ports.values()), "uids"
        for tensor in self.ports.values():
            address = pack[tensor.uid]
            assert type(address) is int
            if address % 16:
                raise RuntimeError(f"Uid {tensor.uid}: device pointer is not aligned to the tensor's 16-byte alignment.")
        self.module.log.append(("execute", self.module.engines[self.plan], handle.stream))
        self.module.defer(lambda: self._compute(pack, workspace), handle.stream)

    # what it computes

    def _compute(self, pack, workspace):
        nbytes = self.get_workspace_size_plan_at_index(self.plan)
        np.frombuffer((ctypes.c_char * nbytes).from_address(workspace), np.uint8)[...] = 0xA5
        arrays = {name: tensor.at(pack[tensor.uid]) for name, tensor in self.ports.items()}
        hidden = self._hidden(arrays["q"].shape[2], arrays["k"].shape[2])
        with np.errstate(all="ignore"):
            (self._backward if self.backward else self._forward)(arrays, hidden)

    def _hidden(self, rows, keys):
        assert self.alignment is diagonal_alignment.TOP_LEFT
        i, j = np.arange(rows)[:, None], np.arange(keys)[None, :]
        seen = np.ones((rows, keys), bool)
        if self.right is not None:
            seen &= i + self.right >= j
        if self.left is not None:
            seen &= j + self.left > i
        return ~seen

    def _rounded(self, array):
        """As the operands of a tensor core's product are."""
        return array.astype(self.io.value).astype(np.float32)

    def _scores(self, q, k, hidden):
        return np.where(hidden, np.float32(-np.inf), q @ k.T * np.float32(self.scale))

    def _pairs(self, arrays, names):
        group = arrays["q"].shape[1] // arrays["k"].shape[1]
        for batch, head in np.ndindex(*arrays["q"].shape[:2]):
            at = {"q": head, "k": head // group, "v": head // group, "dO": head, "o": head}
            yield batch, head, [arrays[name][batch, at[name]].astype(np.float32) for name in names]

    def _forward(self, arrays, hidden):
        for batch, head, (q, k, v) in self._pairs(arrays, ("q", "k", "v")):
            scores = self._scores(q, k, hidden)
            highest = scores.max(axis=1, keepdims=True)
            weights = np.exp(scores - highest)
            total = weights.sum(axis=1, keepdims=True)
            # of a row that sees nothing cuDNN makes no promise
            arrays["o"][batch, head] = (self._rounded(weights) @ v / total).astype(self.io.value)
            arrays["stats"][batch, head] = highest + np.log(total)

    def _backward(self, arrays, hidden):
        group = arrays["q"].shape[1] // arrays["k"].shape[1]
        sums = {name: np.zeros(arrays[name].shape, np.float32) for name in ("dK", "dV")}
        for batch, head, (q, k, v, o, dout) in self._pairs(arrays, ("q", "k", "v", "o", "dO")):
            delta = (o * dout).sum(axis=1, keepdims=True)
            weights = np.exp(self._scores(q, k, hidden) - arrays["stats"][batch, head])
            slopes = self._rounded(weights * (dout @ v.T - delta) * np.float32(self.scale))
            arrays["dQ"][batch, head] = (slopes @ k).astype(self.io.value)
            # heads that share keys: each rounded, then summed
            sums["dK"][batch, head // group] += self._rounded(slopes.T @ q)
            sums["dV"][batch, head // group] += self._rounded(self._rounded(weights).T @ dout)
        for name, total in sums.items():
            arrays[name][...] = total.astype(self.io.value)
