"""Mutations of valid files, as from a truncated download, a bad disk or an attacker."""

import copy
import json
import random
import struct

_NASTY_NUMBERS = [0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")]
_NASTY_TEXTS = [
    "",
    " ",
    "\x00",
    "../../etc/passwd",
    "/etc/passwd",
    "<script>",
    "\ud800",
    "é" * 300,
    "null",
    "[",
    "{}",
    "query",
]
_NASTY_VALUES = [None, True, False, [], {}, [[]], [{}], *_NASTY_NUMBERS, *_NASTY_TEXTS]  # fmt: skip


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """One to four small changes: flipped bits, other bytes, pieces removed, doubled, moved or filled."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        size = min(draw.choice([1, 1, 2, 4, 8, 50]), len(data) - at)
        kind = draw.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + size] = draw.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size] * draw.randint(1, 3)
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at : at + size] = bytes([draw.choice([0, 10, 34, 44, 91, 93, 123, 125, 255])]) * size
        else:
            data[at:at] = draw.choice([b"\r\n", b'"', b"\xff\xfe", b"\xef\xbb\xbf", b"\t", b"9" * 30, b"[" * 2000])
    return bytes(data)


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """Valid JSON with values replaced, fields removed, renamed or nested deeply."""
    value = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        parent, key = _any_place(value, draw)
        if parent is None:
            continue
        kind = draw.randrange(5)
        if kind <= 2:
            # A copy: a later mutation of a shared list would change the table.
            parent[key] = copy.deepcopy(draw.choice(_NASTY_VALUES))
        elif kind == 3:
            del parent[key]
        elif isinstance(parent, dict):
            parent[draw.choice(_NASTY_TEXTS)] = parent.pop(key)
    text = json.dumps(value)
    if draw.random() < 0.02:
        text = text.replace("null", "[" * 5000 + "]" * 5000, 1)
    return text.encode("utf-8", "surrogatepass")


def _any_place(value, draw):
    """A container and a key in it, drawn from the entire tree."""
    parent = key = None
    while isinstance(value, dict | list) and value:
        if parent is not None and draw.random() < 0.3:
            break
        parent = value
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value = parent[key]
    return parent, key


def mutate_safetensors(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with a wrong header: lengths, offsets, types, shapes, names."""
    (length,) = struct.unpack("<Q", content[:8])
    header = mutate_json(content[8 : 8 + length], draw)
    if draw.random() < 0.3:
        tree = json.loads(content[8 : 8 + length])
        tensor = tree[draw.choice([name for name in tree if name != "__metadata__"])]
        field = draw.choice(["dtype", "shape", "data_offsets"])
        tensor[field] = {
            "dtype": draw.choice(["F64", "BF16", "I64", "BOOL", "F8_E4M3", "Q3", ""]),
            "shape": draw.choice([[], [0], [-1], [1 << 40, 1 << 40], [2**63], tensor["shape"][::-1]]),
            "data_offsets": draw.choice([[0, 0], [8, 0], [0, 1 << 62], [-8, 8], [0, 4]]),
        }[field]
        header = json.dumps(tree).encode()
    stated = draw.choice([len(header)] * 6 + [0, len(header) - 1, len(header) + 1, 2**40, 2**64 - 1])
    return struct.pack("<Q", stated) + header + content[8 + length :]
