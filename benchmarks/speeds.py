"""Seconds of steps to people a second, ratios and utilisation."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def speeds(taken: Mapping[str, list[float]], batch: int, flops: int, peak: float | None) -> Row:
    """People a second, their ratios to the peer's (repetition by repetition) and the utilisation."""
    rates = {name: spread([batch / t for t in times]) for name, times in taken.items() if times}
    pairs = {name: "peer_again" if name == "ours_compiled" else "peer" for name in taken if name.startswith("ours")}
    ratios = {ours: over(taken[theirs], taken[ours]) for ours, theirs in pairs.items() if taken.get(theirs)}
    chunked = taken.get("ours_chunked", taken["ours"])
    whole = taken["ours"] if "ours_chunked" in taken else taken.get("ours_one_chunk")
    return {
        "people_per_second": rates,
        "ratio": ratios or None,
        "chunks_cost": over(chunked, whole) if whole else None,
        "tflops_per_person": round(flops / 1e12, 6),
        "mfu": {name: round(rate["median"] * flops / peak / 1e12, 4) for name, rate in rates.items()} if peak else None,
        "outcome": "measured" if "peer" in taken else "ours measured; the peer ran out of memory",
    }


def over(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def text(row: Row) -> str:
    """A model for the terminal."""
    head = f"head in chunks of {row['head_chunk']}" if row["head_chunk"] else "head in one chunk"
    blocks = f"{row['checkpointed_blocks']} blocks checkpointed, {head}"
    lines = [f"\n{row['model']}, {row['way']}, {row['precision']}, {row['micro_batch']} people, {blocks}"]
    for name, rate in row["people_per_second"].items():
        ratio, mfu = (row["ratio"] or {}).get(name), (row["mfu"] or {}).get(name)
        times = f"  x {_range(ratio)}" if ratio else ""
        lines.append(f"  {name:20}{_range(rate)}{times}" + (f"  MFU {mfu:.1%}" if mfu else ""))
    if row["chunks_cost"]:
        lines.append(f"  chunks of the head take x {_range(row['chunks_cost'])} the time of one chunk")
    return "\n".join(lines)


def _range(found: Mapping[str, float]) -> str:
    return f"{found['median']:.3f} ({found['lowest']:.3f} to {found['highest']:.3f})"
