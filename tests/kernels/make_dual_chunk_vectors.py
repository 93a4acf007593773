"""Makes dual_chunk_vectors.json: numbers of Dual Chunk Attention by the rules of the released code, without torch.

`python tests/kernels/make_dual_chunk_vectors.py` writes the file anew. Position tables, segments of decoding and the
merge are those of vLLM's backend for the 1M models (up to v0.10: three attention calls per chunk, merged by their
log-sum-exp); `paper` has the clamp of arXiv 2501.15383, figure 2, at chunk_size - 1 instead of chunk_size.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dual_chunk_vectors.json")
Vector = list[float]


def position_tables(chunk_size: int, local_size: int, last: int) -> dict[str, list[int]]:
    """Tables over the rows of one chunk; `last` is the largest position."""
    chunk_len = chunk_size - local_size
    successive = [min(row + chunk_len, last) for row in range(chunk_len)]
    return {"q": list(range(chunk_len)), "q_succ": successive, "q_inter": [min(2 * chunk_len - 1, last)] * chunk_len}


def distances(chunk_size: int, local_size: int, last: int, tokens: int) -> list[list[int]]:
    """Position of query minus position of key for all pairs, -1 for keys behind the query."""
    chunk_len = chunk_size - local_size
    tables = position_tables(chunk_size, local_size, last)
    matrix = [[-1] * tokens for _ in range(tokens)]
    for i in range(tokens):
        for j in range(i + 1):
            name = ("q", "q_succ", "q_inter")[min(i // chunk_len - j // chunk_len, 2)]
            matrix[i][j] = tables[name][i % chunk_len] - j % chunk_len
    return matrix


def row_of_large_layout(chunk_size: int, local_size: int, row: int) -> dict[str, int]:
    """What decoding of the released code takes for the token at `row`: positions, and keys of each part."""
    chunk_len, cache = chunk_size - local_size, row + 1
    chunk = (cache - 1) // chunk_len
    within = row % chunk_len
    return {
        "row": row,
        "intra": within,
        "succ": min(within + chunk_len, chunk_size),
        "succ_paper": min(within + chunk_len, chunk_size - 1),
        "inter": min(2 * chunk_len - 1, chunk_size),
        "inter_paper": min(2 * chunk_len - 1, chunk_size - 1),
        "key": row % chunk_len,
        "intra_keys": cache - chunk * chunk_len,
        "succ_keys": chunk_len if chunk >= 1 else 0,
        "inter_keys": max(chunk - 1, 0) * chunk_len,
    }


def temperature(length: int, original: int) -> float:
    return max(1.0, 0.1 * math.log(length / original) + 1.0)


def rotate(head: Vector, position: int, base: float) -> Vector:
    half = len(head) // 2
    turned = [0.0] * len(head)
    for d in range(half):
        angle = position * base ** (-d / half)
        cos, sin = math.cos(angle), math.sin(angle)
        turned[d] = head[d] * cos - head[d + half] * sin
        turned[d + half] = head[d + half] * cos + head[d] * sin
    return turned


def attend(q: Vector, keys: list[Vector], values: list[Vector], scale: float) -> tuple[Vector, float]:
    logits = [scale * sum(a * b for a, b in zip(q, key, strict=True)) for key in keys]
    largest = max(logits)
    total = sum(math.exp(logit - largest) for logit in logits)
    weights = [math.exp(logit - largest) / total for logit in logits]
    output = [sum(w * value[d] for w, value in zip(weights, values, strict=True)) for d in range(len(q))]
    return output, largest + math.log(total)


def merge(parts: list[tuple[Vector, float]]) -> tuple[Vector, float]:
    largest = max(lse for _, lse in parts)
    weights = [math.exp(lse - largest) for _, lse in parts]
    total = sum(weights)
    output = [
        sum(w * out[d] for w, (out, _) in zip(weights, parts, strict=True)) / total for d in range(len(parts[0][0]))
    ]
    return output, largest + math.log(total)


def three_calls(
    q: list[Vector], k: list[Vector], v: list[Vector], layout: tuple[int, int, int], base: float, s: float
) -> tuple[list[Vector], list[float]]:
    """One head: keys times s and rotated once, scale times s, up to three calls per row, merged."""
    chunk_len = layout[0] - layout[1]
    tables = position_tables(*layout)
    keys = [[s * x for x in rotate(key, j % chunk_len, base)] for j, key in enumerate(k)]
    scale = s / math.sqrt(len(q[0]))
    rows = []
    for i, query in enumerate(q):
        first = i // chunk_len * chunk_len
        spans = {"q": (first, i + 1), "q_succ": (first - chunk_len, first), "q_inter": (0, first - chunk_len)}
        rows.append(
            merge(
                [
                    attend(rotate(query, tables[name][i % chunk_len], base), keys[start:end], v[start:end], scale)
                    for name, (start, end) in spans.items()
                    if 0 <= start < end
                ]
            )
        )
    return [output for output, _ in rows], [lse for _, lse in rows]


def numbers(rows: int, width: int, seed: int) -> list[Vector]:
    """Something like random numbers between -1.5 and 1.5, exact in fp32."""
    return [[((i * 37 + d * 101 + seed * 53) ** 2 % 193 - 96) / 64 for d in range(width)] for i in range(rows)]


def vectors() -> dict[str, Any]:
    q, k, v = (numbers(17, 8, seed) for seed in (1, 2, 3))
    attention = []
    for layout in ((6, 2, 6), (6, 2, 5), (8, 3, 8), (8, 3, 7), (5, 4, 5), (32, 4, 32)):
        for s in (1.0, temperature(17, 4)):
            output, lse = three_calls(q, k, v, layout, 100.0, s)
            attention.append({"layout": layout, "s": s, "output": output, "lse": lse})
    parts = [(numbers(1, 4, seed)[0], lse) for seed, lse in ((4, -2.5), (5, 1.25), (6, 0.75))]
    merged, lse = merge(parts)
    rows = (0, 1, 8191, 8192, 253951, 253952, 262143, 262144, 507903, 507904, 761855, 761856, 1009999)
    lengths = ((1000, 32768), (32768, 32768), (131072, 32768), (262145, 262144), (1010000, 262144), (1000000, 32768))
    return {
        "toy": {name: distances(8, 3, last, 17) for name, last in (("released", 8), ("paper", 7))},
        "toy_tables": {name: position_tables(8, 3, last) for name, last in (("released", 8), ("paper", 7))},
        "million": [row_of_large_layout(262144, 8192, row) for row in rows],
        "temperature": [[*pair, temperature(*pair), temperature(*pair) ** 2] for pair in lengths],
        "merge": {"outputs": [out for out, _ in parts], "lses": [x for _, x in parts], "output": merged, "lse": lse},
        "attention": {"q": q, "k": k, "v": v, "base": 100.0, "cases": attention},
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(vectors()) + "\n", encoding="utf-8")
