"""Milliseconds a person of encoding and decoding heatmaps on one CPU core: ours, mmpose's UDPHeatmap, transformers'.

    python benchmarks/codec.py [--peer_python PATH] [--joints 17 133] [--batch 64]

PATH is the Python of an environment with mmpose, or transformers and torchvision, or both (README.md tells how to make
one); without it only ours is timed. All get the same people and take turns, each in a process of its own on one core.
Time is what a process spent on the core, so that its neighbors count little; the wall's is written beside it.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
import sapiens_accel  # isort: skip  # noqa: F401  (before torch: it sets how threads wait)
import numpy as np
import record
import torch
from codec_peer import seconds
from elsewhere import Elsewhere

from sapiens_accel.errors import UserError, run_main
from sapiens_accel.pose.heatmap import BLUR_KERNEL, Codec
from sapiens_accel.selftest.throughput import spread, spread_of_ratios

Row = dict[str, Any]
STEPS = ("encode", "decode")
BARS = {"encode_ratio_mmpose": 4.0, "decode_ratio_mmpose": 8.0}
HEIGHT, NOISE = 0.8, 0.01  # of the maps to decode, as a trained network gives them


def main(words: Sequence[str]) -> None:
    asked = options(words)
    one_core()
    codec = Codec(input_hw=asked.input_hw, heatmap_hw=asked.heatmap_hw, sigma=float(asked.sigma))
    path = record.place("codec", "cpu", record.cpu_name(), asked.out)
    names = ("input_hw", "heatmap_hw", "sigma", "batch", "rounds")
    heading = record.heading("codec", "cpu", record.cpu_name(), **{name: getattr(asked, name) for name in names})
    heading["command"] = f"python benchmarks/codec.py{' --peer_python PATH' if asked.peer_python else ''}"
    heading |= {"pinned": hasattr(os, "sched_setaffinity"), "unit": "ms of one core a person", "bars": BARS}
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(asked.peer_python, Path(folder), codec) if asked.peer_python else None
        heading |= {"peer_versions": peer.versions, "not_measured": peer.missing} if peer else {}
        rows = []
        for num_joints in asked.joints:
            rows.append(compare(codec, asked, num_joints, peer))
            print(text(rows[-1]), flush=True)
            record.write(path, heading | ratios(rows[0]), cases=rows)
    print(f"\n{path}")


def options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="codec.py", description="Heatmaps, ms a person.", allow_abbrev=False)
    parser.add_argument("--peer_python", help="the Python of an environment with mmpose or transformers")
    parser.add_argument("--joints", nargs="+", type=int, default=[17, 133], help="a case for each (17 133)")
    parser.add_argument("--batch", type=int, default=64, help="people of one run (64)")
    parser.add_argument("--input_hw", nargs=2, type=int, default=(512, 384), help="(512 384); the maps have a fourth")
    parser.add_argument("--sigma", type=int, default=3, help="heatmap px (3)")
    parser.add_argument(
        "--rounds", type=int, default=11, help="timed runs of each, an untimed one before every one (11)"
    )
    parser.add_argument("--out", help="the JSON (benchmarks/results/codec_cpu_DATE.json)")
    asked = parser.parse_args(words)
    if min(*asked.joints, asked.batch, asked.rounds, asked.sigma, *asked.input_hw) < 1:
        raise UserError("--joints, --batch, --rounds, --sigma, --input_hw: expected 1 or more of each")
    # The published decoder is the reference only away from the border.
    if (
        any(size % 4 or size // 4 < 5 * BLUR_KERNEL // 2 for size in asked.input_hw)
        or 4 * asked.input_hw[1] != 3 * asked.input_hw[0]
    ):
        raise UserError(
            f"--input_hw {asked.input_hw[0]} {asked.input_hw[1]}: expected 4 to 3, like 512 384, from 160 120"
        )
    asked.input_hw = tuple(asked.input_hw)
    asked.heatmap_hw = (asked.input_hw[0] // 4, asked.input_hw[1] // 4)
    return asked


def one_core() -> None:
    """This process and those that it starts: one thread on one core."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


# ---- One case


def compare(codec: Codec, asked: argparse.Namespace, num_joints: int, peer: "Peer | None") -> Row:
    """The same people for all, in turns; then what they gave."""
    points_xy, maps = people(codec, asked.batch, num_joints)
    weights = torch.ones(points_xy.shape[:2])
    runs = {
        ("ours", "encode"): lambda: codec.encode(points_xy, weights),
        ("ours", "decode"): lambda: codec.decode(maps),
    }
    if peer:
        peer.load(points_xy, maps)
    names = ["ours", *(peer.names if peer else ())]
    taken: dict[tuple[str, str], list[tuple[float, float]]] = {(name, step): [] for step in STEPS for name in names}
    for _ in range(asked.rounds):
        for (name, step), times in taken.items():
            for _ in range(2):  # while the others took their turns its caches and its memory have gone cold
                found = seconds(runs[name, step]) if name == "ours" else peer.run(step, name)
            times.append(found)
    row: Row = {"joints": num_joints}
    for step in STEPS:
        row[step] = {name: _ms(taken[name, step], 0, asked.batch) for name in names}
        row[f"{step}_wall"] = {name: _ms(taken[name, step], 1, asked.batch)["median"] for name in names}
        cpu = {name: [time for time, _ in taken[name, step]] for name in names}
        row[f"{step}_ratio"] = {name: spread_of_ratios(cpu[name], cpu["ours"]) for name in names[1:]}
    row["agreement"] = {name: agreement(codec, points_xy, maps, *peer.results(name)) for name in names[1:]}
    return row


def people(codec: Codec, batch: int, num_joints: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points anywhere in the image, input px, and maps of them with noise."""
    generator = torch.Generator().manual_seed(0)
    last = torch.tensor([codec.input_hw[1] - 1.0, codec.input_hw[0] - 1.0])
    points_xy = torch.rand(batch, num_joints, 2, generator=generator) * last
    maps, _ = codec.encode(points_xy, torch.ones(batch, num_joints))
    return points_xy, maps.mul_(HEIGHT).add_(torch.randn(maps.shape, generator=generator), alpha=NOISE)


def agreement(codec: Codec, points_xy: torch.Tensor, maps: torch.Tensor, their_maps: Any, their_xy: Any) -> Row:
    """Largest differences from ours, and everyone's mean distance from the truth, in input px."""
    ours, _ = codec.encode(points_xy, torch.ones(points_xy.shape[:2]))
    ours_xy, truth = codec.decode(maps)[0].numpy(), points_xy.numpy()
    last = np.array(codec.input_hw[::-1]) - 1
    margin = 4 * (BLUR_KERNEL // 2 + 3)  # ours is another decoder where the published blur reaches beyond the map
    inside = ((truth > margin) & (truth < last - margin)).all(-1)
    error = {"ours": np.linalg.norm(ours_xy - truth, axis=-1), "theirs": np.linalg.norm(their_xy - truth, axis=-1)}
    found = {
        "map_values": max(float(np.abs(a - b).max()) for a, b in zip(ours.numpy(), their_maps, strict=True)),
        "points_inside": float(np.abs(ours_xy - their_xy)[inside].max()),
        "num_inside": int(inside.sum()),
        **{f"error_inside_{name}": float(value[inside].mean()) for name, value in error.items()},
        **{f"error_at_border_{name}": float(value[~inside].mean()) for name, value in error.items()},
    }
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in found.items()}


def _ms(times: Sequence[tuple[float, float]], clock: int, batch: int) -> dict[str, float]:
    return spread([1000 * time[clock] / batch for time in times])


# ---- The others


class Peer(Elsewhere):
    """The process of codec_peer.py: it has loaded the same people, and runs one step at a time when told.

    Raises:
        UserError: that Python does not start, or has neither peer.
    """

    def __init__(self, python: str, folder: Path, codec: Codec) -> None:
        settings = {"input_hw": codec.input_hw, "heatmap_hw": codec.heatmap_hw, "sigma": int(codec.sigma)}
        super().__init__(python, "codec_peer.py", folder, settings)
        told = self.told
        self.names, self.missing, self.versions = told["peers"], told["missing"], told["versions"]
        for name, reason in self.missing.items():
            print(f"{name} is not measured: {reason}", file=sys.stderr)
        if not self.names:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.missing.items())
            raise UserError(f"--peer_python {python}: neither codec can be imported there ({reasons}); see README.md")

    def load(self, points_xy: torch.Tensor, maps: torch.Tensor) -> None:
        np.save(self.folder / "points.npy", points_xy.numpy())
        np.save(self.folder / "maps.npy", maps.numpy())
        self.ask("load")

    def run(self, step: str, name: str) -> tuple[float, float]:
        """Seconds of the core and of the wall."""
        on_core, wall = self.ask(step, name)
        return on_core, wall

    def results(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Its maps, and its points in input px."""
        self.ask("save", name)
        return np.load(self.folder / f"{name}_maps.npy", mmap_mode="r"), np.load(self.folder / f"{name}_points.npy")


# ---- What is told


def ratios(row: Row) -> dict[str, float]:
    """The first case's medians."""
    return {f"{step}_ratio_{name}": r["median"] for step in STEPS for name, r in row[f"{step}_ratio"].items()}


def text(row: Row) -> str:
    lines = [f"\n{row['joints']} keypoints: ms of one core a person, median (lowest to highest); theirs / ours"]
    for step in STEPS:
        for name, ms in row[step].items():
            ratio = row[f"{step}_ratio"].get(name)
            times = f"   x {ratio['median']:.1f} ({ratio['lowest']:.1f} to {ratio['highest']:.1f})" if ratio else ""
            lines.append(f"  {step}  {name:13}{ms['median']:8.3f} ({ms['lowest']:.3f} to {ms['highest']:.3f}){times}")
    for name, found in row["agreement"].items():
        lines.append(
            f"  {name} gives maps within {found['map_values']:.1g} and, inside, points within "
            f"{found['points_inside']:.1g} input px; at the border its mean error is "
            f"{found['error_at_border_theirs']:.2f} px, ours {found['error_at_border_ours']:.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
