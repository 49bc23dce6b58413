"""The tables of `dgpo reward bench`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_tables(result: dict[str, Any], screen: Console) -> None:
    """A table for each part that was measured."""
    for part, table in (
        ("throughput", _throughput),
        ("bodies", _bodies),
        ("proxy", _proxy),
        ("scaling", _scaling),
        ("division", _division),
        ("overload", _overload),
    ):
        if part in result:
            screen.print(table(result[part]))


def _throughput(part: dict[str, Any]) -> Table:
    table = _table(
        f"OCR, {part['clients']} clients, {part['images']} images a request",
        ("server", "direct img/s", "served img/s", "ratio (min-max)", "target", "p50 ms", "p99 ms"),
    )
    for name, row in part["rows"].items():
        table.add_row(
            name,
            f"{row['direct_images_s']:.0f}",
            f"{row['served_images_s']:.0f}",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f}-{row['ratio_max']:.2f})",
            _target(row),
            f"{row['p50_s'] * 1e3:.0f}",
            f"{row['p99_s'] * 1e3:.0f}",
        )
    return table


def _bodies(part: dict[str, Any]) -> Table:
    table = _table(
        f"bodies of {part['images']} images",
        ("images", "body", "bytes", "encode ms", "decode ms", "answered ms"),
    )
    for name, row in part["rows"].items():
        for body in ("safetensors", "json"):
            seconds = [f"{row[body][key] * 1e3:.1f}" for key in ("encode_s", "decode_s", "answered_s")]
            table.add_row(name if body == "safetensors" else "", body, f"{row[body]['bytes']:,}", *seconds)
    return table


def _proxy(part: dict[str, Any]) -> Table:
    table = _table(
        f"a scorer that costs nothing, {part['clients']} clients, {part['images']} images of "
        f"{part['pixels']} x {part['pixels']} a request",
        ("server", "MB/s (min-max)"),
    )
    for name, row in part["rows"].items():
        rates = [row[key] / 1e6 for key in ("bytes_s", "min", "max")]
        table.add_row(name, "{:.0f} ({:.0f}-{:.0f})".format(*rates))
    return table


def _scaling(part: dict[str, Any]) -> Table:
    table = _table(
        f"replicas that follow the load; {part['image_s'] * 1e3:.0f} ms an image",
        ("replicas", "images/s", "of N x one", "target", "up s", "down s", "p50 ms", "p99 ms"),
    )
    table.add_row("1", f"{part['one_images_s']:.1f}", "", "", "", "", "", "")
    table.add_row(
        str(part["replicas"]),
        f"{part['most_images_s']:.1f}",
        f"{part['ratio']:.2f}",
        _target(part),
        f"{part['up_s']:.1f}",
        f"{part['down_s']:.1f}",
        f"{part['p50_s'] * 1e3:.0f}",
        f"{part['p99_s'] * 1e3:.0f}",
    )
    return table


def _division(part: dict[str, Any]) -> Table:
    routers = list(dict.fromkeys(row["router"] for row in part["rows"]))
    table = _table(
        f"seconds of a group of {part['images']} images on {part['replicas']} replicas, "
        f"{part['image_s'] * 1e3:.0f} ms an image: mean (max)",
        ("replicas, workers", "images a request", "at best", *routers),
    )
    found = {
        (row["slow"], row["workers"], row["images_per_request"], row["router"]): row for row in part["rows"]
    }
    for slow, workers, size in dict.fromkeys(key[:3] for key in found):
        here = [found[slow, workers, size, router] for router in routers]
        table.add_row(
            f"{'one half as fast' if slow else 'alike'}, {workers}",
            str(size or part["images"]),
            f"{here[0]['ideal_s']:.2f}",
            *(f"{row['mean_s']:.2f} ({row['max_s']:.2f})" for row in here),
        )
    return table


def _overload(part: dict[str, Any]) -> Table:
    table = _table(
        f"{part['requests']:,} requests at {part['overload']:.1f} times the {part['capacity_s']:.0f}/s "
        "that it can do",
        ("what", "found"),
    )
    rows = {
        "scored, each once": f"{part['scored']:,} ({part['scored_s']:.0f}/s)",
        "shed: 429 with Retry-After": f"{part['shed']:,}",
        "lost: no answer at all": str(part["lost"]),
        "wrong answers": str(part["wrong"]),
        "such as": "; ".join(part["examples"]),
        "scored but not answered": str(part["scored_unanswered"]),
        "shed, came back, scored once": f"{part['came_back_scored_once']} of {part['came_back']}",
        "p50, p99 of the scored, ms": f"{part['p50_s'] * 1e3:.0f}, {part['p99_s'] * 1e3:.0f}",
        "server memory, MB": f"{part['memory_start_bytes'] / 1e6:.1f}, "
        f"at most {part['memory_most_bytes'] / 1e6:.1f} ({part['memory_growth']:+.1%})",
    }
    for what, found in rows.items():
        table.add_row(what, found)
    return table


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _target(row: dict[str, Any]) -> str:
    return f">= {row['target']:.2f}" + ("" if row["met"] else "  missed")
