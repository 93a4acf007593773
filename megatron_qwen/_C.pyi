from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    cxx_compiler: str
    cuda_compiler: str
    cuda_architectures: list[str]
    cuda_compiled: bool

def build_info() -> BuildInfo: ...
def copy_bandwidth(destination: int, source: int, num_bytes: int, stream: int = 0, *, num_blocks: int = 0) -> None: ...
def column_sum(*, partial: int, out: int, rows: int, columns: int, dtype: str, stream: int = 0) -> None: ...
