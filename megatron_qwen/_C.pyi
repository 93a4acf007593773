from typing import TypedDict

# Tables (cos, sin, rows, half); positions (address, bytes of one, tokens per position); layout (groups, queries per
# group, head_dim); heads (address, strides of sequence, batch and heads).
_Tables = tuple[int, int, int, int]
_Positions = tuple[int, int, int]
_Layout = tuple[int, int, int]
_Heads = tuple[int, int, int, int]

class BuildInfo(TypedDict):
    version: str
    cxx_compiler: str
    cuda_compiler: str
    cuda_architectures: list[str]
    cuda_compiled: bool

def build_info() -> BuildInfo: ...
def copy_bandwidth(destination: int, source: int, num_bytes: int, stream: int = 0, *, num_blocks: int = 0) -> None: ...
def column_sum(*, partial: int, out: int, rows: int, columns: int, dtype: str, stream: int = 0) -> None: ...
def rms_norm_forward(
    *,
    x: int,
    residual: int,
    weight: int,
    y: int,
    sum: int,
    inverse_rms: int,
    rows: int,
    hidden: int,
    x_stride: int,
    residual_stride: int,
    eps: float,
    dtype: str,
    weight_dtype: str,
    stream: int = 0,
) -> None: ...
def rms_norm_backward_programs(*, rows: int, hidden: int, dtype: str, adds: bool) -> int: ...
def rms_norm_backward(
    *,
    grad: int,
    grad_sum: int,
    x: int,
    weight: int,
    inverse_rms: int,
    grad_x: int,
    grad_weight: int,
    partial: int,
    rows: int,
    hidden: int,
    x_stride: int,
    num_programs: int,
    dtype: str,
    weight_dtype: str,
    stream: int = 0,
) -> None: ...
def swiglu_forward(
    *, packed: int, out: int, rows: int, width: int, packed_stride: int, dtype: str, stream: int = 0
) -> None: ...
def swiglu_backward(
    *,
    grad: int,
    packed: int,
    grad_packed: int,
    rows: int,
    width: int,
    grad_stride: int,
    packed_stride: int,
    dtype: str,
    stream: int = 0,
) -> None: ...
def qkv_rope_forward(
    *,
    packed: int,
    bias: int,
    q: int,
    k: int,
    v: int,
    tables: _Tables,
    positions: _Positions,
    layout: _Layout,
    tokens: int,
    packed_stride: int,
    dtype: str,
    bias_dtype: str,
    stream: int = 0,
) -> None: ...
def qkv_rope_backward_programs(*, layout: _Layout, half: int, tokens: int, dtype: str) -> int: ...
def qkv_rope_backward(
    *,
    grad_q: _Heads,
    grad_k: _Heads,
    grad_v: _Heads,
    grad_packed: int,
    grad_bias: int,
    partial: int,
    tables: _Tables,
    positions: _Positions,
    layout: _Layout,
    tokens: int,
    batch: int,
    num_programs: int,
    dtype: str,
    bias_dtype: str,
    stream: int = 0,
) -> None: ...
def rope(
    *,
    q: _Heads,
    k: _Heads,
    tables: _Tables,
    positions: _Positions,
    q_heads: int,
    k_heads: int,
    head_dim: int,
    tokens: int,
    batch: int,
    inverse: bool,
    dtype: str,
    stream: int = 0,
) -> None: ...

# Attention, see csrc/bindings/attention.h. Heads: address, strides of batch, rows and heads. The problem: sizes
# (batch, rows of queries and of keys, heads of queries and of keys, head_dim); chunks (L, cap, inter, alike_from,
# plain); sequences (addresses of boundaries, bytes of one, positions of the first query and key); tiles (address of
# the list, slots, first, per chunk); tables (cos, sin, rows); scale; address of logit_scale.
_Chunks = tuple[int, int, int, int, bool]
_AttentionTables = tuple[int, int, int]
_AttentionProblem = tuple[
    tuple[int, int, int, int, int, int],
    _Chunks,
    tuple[int, int, int, int, int],
    tuple[int, int, int, int],
    _AttentionTables,
    float,
    int,
]

attention_tile_rows: int

def attention_forward(
    *, problem: _AttentionProblem, q: _Heads, k: _Heads, v: _Heads, out: int, lse: int, dtype: str, stream: int = 0
) -> None: ...
def attention_rotate(
    *,
    x: _Heads,
    shape: tuple[int, int, int, int],
    positions: int,
    start: int,
    tables: _AttentionTables,
    chunks: _Chunks,
    copies: int,
    out: int,
    dtype: str,
    stream: int = 0,
) -> None: ...
def attention_row_terms(
    *,
    grad: _Heads,
    output: _Heads,
    shape: tuple[int, int, int, int],
    lse: int,
    exponents: int,
    deltas: int,
    dtype: str,
    stream: int = 0,
) -> None: ...
def attention_keys_backward(
    *,
    problem: _AttentionProblem,
    rows: tuple[_Heads, int, int],
    k: _Heads,
    v: _Heads,
    grad: _Heads,
    turns_back: bool,
    dk: int,
    dv: int,
    dtype: str,
    stream: int = 0,
) -> None: ...
def attention_queries_backward(
    *,
    problem: _AttentionProblem,
    rows: tuple[_Heads, int, int],
    k: _Heads,
    v: _Heads,
    grad: _Heads,
    dq: int,
    dtype: str,
    stream: int = 0,
) -> None: ...

# Addresses of offsets and tokens; experts, routed rows, shared tokens, rows of x; sizes H, F and Fs.
_Groups = tuple[int, int, int, int, int, int, int, int, int]

most_groups: int

def grouped_up(
    *, groups: _Groups, x: int, fc1: list[int], packed: int, hidden: int, dtype: str, stream: int = 0
) -> None: ...
def grouped_down(
    *,
    groups: _Groups,
    a: int,
    matrices: list[int],
    row_weights: int,
    out: int,
    factor: int,
    transposed: bool,
    dtype: str,
    stream: int = 0,
) -> None: ...
def grouped_activation_backward(
    *,
    groups: _Groups,
    grad: int,
    fc2: list[int],
    row_weights: int,
    slots: int,
    packed: int,
    grad_packed: int,
    hidden: int,
    partial: int,
    dtype: str,
    stream: int = 0,
) -> None: ...
def grouped_weight_gradient(
    *,
    groups: _Groups,
    flat: int,
    x: int,
    out: list[int],
    factor: int,
    transposed: bool,
    adds: bool,
    out_dtype: str,
    dtype: str,
    stream: int = 0,
) -> None: ...
def activation_backward_columns(*, width: int) -> int: ...
def moe_row_map(
    *,
    source: int,
    weights: int,
    gates: int,
    tokens: int,
    row_weights: int,
    routed: int,
    shared_tokens: int,
    topk: int,
    stream: int = 0,
) -> None: ...
def moe_combine(
    *,
    rows: int,
    positions: int,
    shared: int,
    scale: int,
    vector: int,
    out: int,
    tokens: int,
    size: int,
    topk: int,
    dtype: str,
    stream: int = 0,
) -> None: ...
def moe_gate(*, x: int, vector: int, out: int, tokens: int, size: int, dtype: str, stream: int = 0) -> None: ...
def moe_gate_gradient_programs(*, tokens: int, size: int) -> int: ...
def moe_gate_gradient(
    *, scale: int, x: int, partial: int, tokens: int, size: int, programs: int, dtype: str, stream: int = 0
) -> None: ...
