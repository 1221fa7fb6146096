"""Files that are odd in a seeded way: bytes flipped and cut, values of JSON, YAML, tables and archives replaced."""

import copy
import io
import json
import math
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

Mutate = Callable[[random.Random, bytes], bytes]
DEEP = 3_000
NOT_JSON = [
    "1e400", "-1e400", "NaN", "-Infinity", "01", "+1", ".5", "1_000", "0x10", "'text'", "nul", "", '"\\ud800"',
    '"\\u0000"', "[" * 100_000, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "9" * 5_000, "1e308", "-0",
    "1.0", "// comment",
]  # fmt: skip
LAUGHS = "".join(  # each list has nine of the one before
    f"{name}: &{name} [{', '.join([value] * 9)}], "
    for name, value in zip("abcdef", ["1", "*a", "*b", "*c", "*d", "*e"], strict=True)
)
NOT_YAML = [
    ".nan", ".inf", "-.inf", "1e308", "1e-400", "~", "!!python/object/apply:os.system [exit]", "&a [*a]", "*b", "@",
    "2020-01-01", "2020-13-45", "yes", "0x10", "1_000", "!!binary ABC", "!!set {a}", "!!timestamp x", "|", "? a", "[",
    "{", "- a", "a: b: c", "\t", "%TAG", "`", "12:30:45", "!!float x", "!!int 1.5", "!!bool x", "{[1]: 2}", "{1: 2}",
    "&a [&b [&c [*a, *b, *c]]]", "!!omap [a: 1]", "[" * DEEP + "]" * DEEP, "9" * 5_000, "'\\0'", '"\\0"', '"\\e[2J"',
    "{" + LAUGHS + "}",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 17, 2**31, -(2**31) - 1, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400, math.nan, math.inf,
    -math.inf, 1e308, -1e308, 5e-324, 0.5, -0.0, 1e-9, 1e9, 65_500, 1_000_000,
]  # fmt: skip
TEXTS = [
    "", " ", "text", "1", "-1.5", "nan", "1e5", "true", "null", "\0", "a\nb", "\x1b[2J", "\u202eabc", "é", "../../x",
    "/dev/zero", "/dev/null", "/", ".", "~", "a" * 10_000, "C:\\x", "file://x", "https://x.invalid/x.jpg", "%s%n",
    "{0}", "<b>|</b>",
]  # fmt: skip


class Raw(str):
    """Text that goes into a file as it is."""


def odd_value(rng: random.Random) -> Any:
    """Something that hardly any reader expects."""
    deep: Any = 1
    for _ in range(200):
        deep = [deep]
    things = [
        None,
        True,
        False,
        [],
        [[]],
        {},
        {"a": 1},
        [None],
        [1, 2, 3],
        [0.5] * 51,
        [math.nan] * 4,
        [[1, 2], [3]],
        deep,
    ]
    pool = rng.choice([NUMBERS, NUMBERS, TEXTS, things])
    return copy.deepcopy(rng.choice(pool))


# ---- Bytes


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or blank some bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        size = len(out)
        at = rng.randrange(size) if size else 0
        # Headers are short and matter most.
        at = rng.randrange(min(size, 200)) if size and rng.random() < 0.3 else at
        length = min(size - at, rng.choice([1, 1, 2, 4, 8, 100, 5_000]))
        match rng.randrange(8):
            case 0 | 1:
                for i in range(at, at + length):
                    out[i] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + length] = rng.randbytes(length)
            case 3:
                del out[at:]
            case 4:
                del out[at : at + length]
            case 5:
                out[at:at] = rng.randbytes(length) if rng.random() < 0.5 else out[at : at + length]
            case 6:
                out[at : at + length] = bytes([rng.choice([0, 255])]) * length
            case _:
                out += rng.randbytes(rng.choice([1, 100]))
    return b"" if rng.random() < 0.01 else bytes(out)


# ---- Trees: JSON, YAML and what other formats hold


def _nodes(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in a tree, the tree itself first."""
    yield at
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        yield from _nodes(value, (*at, key))


def _get(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def of_tree(rng: random.Random, tree: Any, odd: Callable[[random.Random], Any] = odd_value) -> Any:
    """A copy of the tree with one to three values replaced, dropped, doubled, scaled or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        paths = list(_nodes(tree))
        # Long lists of numbers do not drown the rest: levels are equally likely.
        depth = rng.randint(0, max(map(len, paths)))
        path = rng.choice([path for path in paths if len(path) == depth])
        if not path:
            if rng.random() < 0.2:
                tree = odd(rng)
            continue
        holder, key = _get(tree, path[:-1]), path[-1]
        value = holder[key]
        match rng.randrange(10):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(value))
            case 1:
                holder[f"{key}" + rng.choice(["", "_", " ", "\0"])] = copy.deepcopy(value)
            case 2:
                holder[key] = copy.deepcopy(_get(tree, rng.choice(paths[1:])) if len(path) else value)
            case 3 if isinstance(value, int | float) and abs(value) < 1e300:
                holder[key] = value * rng.choice([-1, 0.1, 1e6, 1e300])
            case 3:
                holder[key] = str(value)
            case 4 if isinstance(value, list | str):
                holder[key] = value[: rng.randint(0, len(value))]
            case 5 if isinstance(value, list) and value:
                rng.shuffle(value)
            case _:
                holder[key] = odd(rng)
    return tree


def as_json(tree: Any, rng: random.Random) -> bytes:
    """The tree as text, now and then with a key twice; Raw stands in it as it is."""

    def text(node: Any) -> str:
        if isinstance(node, Raw):
            return node
        if isinstance(node, dict):
            pairs = [f"{json.dumps(str(key))}: {text(value)}" for key, value in node.items()]
            if pairs and rng.random() < 0.003:
                pairs.append(f"{json.dumps(str(rng.choice(list(node))))}: {text(odd_value(rng))}")
            return "{" + ", ".join(pairs) + "}"
        return f"[{', '.join(map(text, node))}]" if isinstance(node, list) else _number_or_text(node)

    return text(tree).encode("utf-8", "surrogatepass")


def _number_or_text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        return "1" + "0" * 400  # Python itself refuses to write numbers of more than 4,300 digits
    return json.dumps(value, default=str)


def _odd_json(rng: random.Random) -> Any:
    return Raw(rng.choice(NOT_JSON)) if rng.random() < 0.15 else odd_value(rng)


def of_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON with odd values, or with its bytes damaged."""
    if rng.random() < 0.15:
        return of_bytes(rng, data)
    text = as_json(of_tree(rng, json.loads(data), _odd_json), rng)
    return b"\xef\xbb\xbf" + text if rng.random() < 0.01 else text


def of_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines: one of them odd."""
    if rng.random() < 0.2:
        return of_bytes(rng, data)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = of_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


def of_yaml(rng: random.Random, data: bytes) -> bytes:
    """A YAML with odd values, odd syntax, or its bytes damaged."""
    kind = rng.random()
    if kind < 0.15:
        return of_bytes(rng, data)
    if kind < 0.45:
        lines = data.decode().splitlines()
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon} {rng.choice(NOT_YAML)}"
        return "\n".join(lines).encode()
    tree = of_tree(rng, yaml.safe_load(data))
    try:
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, ValueError, RecursionError):
        return of_bytes(rng, data)


# ---- Weights


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header's tree, values of the tensors, or bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], bytearray(data[8 + length :])
    kind = rng.random()
    if kind < 0.3:
        return of_bytes(rng, data)
    if kind < 0.5:
        for _ in range(rng.choice([1, 10, 1_000])):
            at = rng.randrange(len(body) // 4) * 4
            body[at : at + 4] = struct.pack("<f", rng.choice([math.nan, math.inf, -math.inf, 1e38, 0.0, 1e-40, 1e6]))
        return data[: 8 + length] + bytes(body)
    tree, few = json.loads(header), rng.random() < 0.5
    if few:  # an entry's own values are as likely as the entries
        name = rng.choice(list(tree))
        tree[name] = of_tree(rng, tree[name])
    else:
        tree = of_tree(rng, tree)
    made = as_json(tree, rng)
    made += b" " * (-len(made) % 8)
    length = len(made) if rng.random() < 0.95 else rng.choice([0, 2**40, 2**63, len(made) * 2])
    return struct.pack("<Q", length) + made + bytes(body)


def _odd_tensor(rng: random.Random) -> Any:
    some = torch.arange(6.0).reshape(2, 3)
    tensors = [
        some.to(torch.complex64), some.to_sparse(), some.bool(), some.long(), some[:0], torch.tensor(math.nan),
        some.half(), some.expand(5, 2, 3), torch.full((2, 3), math.inf), some.to("meta"), some.t(), torch.zeros(0),
        torch.quantize_per_tensor(some, 1.0, 0, torch.qint8), torch.nn.Parameter(some), torch.zeros([1] * 20),
    ]  # fmt: skip
    return rng.choice(tensors) if rng.random() < 0.6 else odd_value(rng)


def of_pth(rng: random.Random, data: bytes) -> bytes:
    """Odd values in the pickle, its bytes, or those of its zip."""
    kind = rng.random()
    if kind < 0.25:
        return of_bytes(rng, data)
    if kind < 0.55:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            names = old.namelist()
            odd = rng.choice([next(name for name in names if name.endswith("data.pkl")), rng.choice(names)])
            for name in names:
                new.writestr(name, of_bytes(rng, old.read(name)) if name == odd else old.read(name))
        return out.getvalue()
    out = io.BytesIO()
    try:
        tree = of_tree(rng, torch.load(io.BytesIO(data), weights_only=True), _odd_tensor)
        torch.save(tree, out, _use_new_zipfile_serialization=rng.random() < 0.8)
    except Exception:
        return of_bytes(rng, data)
    return out.getvalue()


# ---- Images


def of_image(rng: random.Random, data: bytes) -> bytes:
    """Other sizes in the header, or bytes."""
    if rng.random() < 0.3:
        size = [rng.choice([0, 1, 2, 3_000, 20_000, 65_500, 65_535]) for _ in range(2)]
        if data.startswith(b"\x89PNG"):
            header = b"IHDR" + struct.pack(">II", *size) + data[24:29]
            return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]
        for marker in (b"\xff\xc0", b"\xff\xc2"):
            at = data.find(marker)
            if at > 0:
                return data[: at + 5] + struct.pack(">HH", *size) + data[at + 9 :]
    return of_bytes(rng, data)


# ---- Tables and archives


def of_parquet(rng: random.Random, data: bytes) -> bytes:
    """Columns dropped, renamed and of other types, odd values in them, odd categories, or bytes."""
    if rng.random() < 0.25:
        return of_bytes(rng, data)
    table = pq.read_table(io.BytesIO(data))
    for _ in range(20):
        try:
            return _written(_odd_table(rng, table))
        except (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError, KeyError, AttributeError):
            continue  # pyarrow has no such table
    return of_bytes(rng, data)


def _written(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=2)
    return out.getvalue()


def _odd_table(rng: random.Random, table: pa.Table) -> pa.Table:
    name = rng.choice(table.column_names)
    at = table.column_names.index(name)
    column = table.column(name)
    match rng.randrange(8):
        case 0:
            return table.drop_columns([name])
        case 1:
            return table.rename_columns(
                [rng.choice([*TEXTS[:6], "image", "id"]) if one == name else one for one in table.column_names]
            )
        case 2:
            types = [
                pa.string(),
                pa.int8(),
                pa.float64(),
                pa.bool_(),
                pa.binary(),
                pa.large_string(),
                pa.uint64(),
                pa.int32(),
            ]
            return table.set_column(at, name, column.cast(rng.choice(types)))
        case 3:
            kind = rng.choice([column.type, pa.null(), pa.int64(), pa.list_(pa.int64())])
            return table.set_column(at, name, pa.nulls(len(column), kind))
        case 4:
            return table.append_column(rng.choice([name, "caption"]), column)
        case 5:
            told = dict(table.schema.metadata or {})
            key = rng.choice(list(told)) if told else b"x"
            told[key] = of_json(rng, told.get(key, b"{}"))
            return table.replace_schema_metadata(told)
        case 6:
            return table.slice(0, rng.choice([0, 1]))
        case _:
            rows = of_tree(rng, table.to_pylist())
            schema = table.schema if rng.random() < 0.5 else None
            return pa.Table.from_pylist(rows, schema=schema).replace_schema_metadata(table.schema.metadata)


def of_tar(rng: random.Random, data: bytes) -> bytes:
    """Members renamed, dropped, of other types, their JSON odd, or bytes."""
    if rng.random() < 0.3:
        return of_bytes(rng, data)
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        members = old.getmembers()
        odd = rng.randrange(len(members))
        for index, member in enumerate(members):
            file = old.extractfile(member)
            content, action = file.read() if file else b"", rng.randrange(6)
            if index == odd:
                if action == 0:
                    continue
                if action == 1:
                    member.name = rng.choice(
                        ["../../x.jpg", "/x.json", "a" * 300 + ".jpg", "x", "é.png", members[0].name, ".", "a\nb.json"]
                    )
                elif action == 2:
                    member.type = rng.choice(
                        [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
                    )
                    member.linkname = rng.choice(["/dev/zero", members[0].name, "x"])
                    content, member.size = b"", 0
                elif member.name.endswith(".json"):
                    content = of_json(rng, content)
                else:
                    content = of_image(rng, content)
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    made = bytearray(out.getvalue())
    if rng.random() < 0.1:  # a size that the file does not have
        made[124:136] = rng.choice([b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\x80" + b"\xff" * 11])
    return bytes(made)


def of_text(rng: random.Random, data: bytes) -> bytes:
    """By what the text is."""
    return of_json(rng, data) if data.lstrip()[:1] in (b"{", b"[") else of_yaml(rng, data)
