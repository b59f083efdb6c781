"""Writes the tables of speed and memory in README.md and docs/performance.md from the records of ``unichar bench``.

A table stands between ``<!-- benchmarks: KIND -->`` and ``<!-- end -->``, where KIND is compiled, measured, or
prices (what fits on which card, and how long it takes); everything between them is replaced. Records are in
docs/benchmarks, one file for each kind of device.

    python scripts/performance_table.py            # write
    python scripts/performance_table.py --check    # exit code 1 if a document says something else
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RECORDS = REPOSITORY / "docs" / "benchmarks"
DOCUMENTS = ("README.md", "docs/performance.md")

GIB, TERA = 2**30, 1e12
_TABLE = re.compile(r"(<!-- benchmarks: (compiled|measured|prices) -->\n).*?(<!-- end -->)", re.DOTALL)

Record = dict[str, Any]


def records(folder: Path = RECORDS) -> list[Record]:
    """All records, by device and command."""
    return [r for path in sorted(folder.glob("*.json")) for r in json.loads(path.read_text("utf-8"))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _ordered(found: list[Record]) -> list[Record]:
    return sorted(found, key=lambda r: ("lora" in r["command"], r["command"]))


def _kernel(r: Record) -> str:
    return f"`{r['kernel']}`" + ("" if r["proven"] else " (a stand-in)")


def _device_memory(r: Record) -> str:
    memory = r["memory"]
    if memory is None:
        return f"no room in {r['chip_memory'] / GIB:.1f}"
    used = sum(memory[k] for k in ("arguments", "outputs", "temporaries", "code")) - memory["reused"]
    return f"{used / GIB:.1f} of {r['chip_memory'] / GIB:.1f}" + ("" if r["fits"] else ": does not fit")


JOBS = {
    "draw": "a picture of 1,024 px",
    "chat": "a reply",
    "sft-lora-bagel-7b": "stage 1, adapters, 500 steps",
    "grpo-bagel-7b": "stage 2, 100 rounds",
    "sft-bagel-7b": "stage 1, all weights, 500 steps",
}
"""Commands of ``unichar plan``, and what the list calls them."""

SHARE, STEPS, ROUNDS = 0.4, 500, 100
"""Of the least time at the data sheet's peak that work is taken to run at; and the lengths of the stages."""


def price_table(found: list[Record]) -> str:
    """What fits on which card, and how long it takes."""
    cells: dict[str, dict[str, list[str]]] = {}
    for r in _ordered(found):
        _, _, job, _, _topology, *options = r["command"].split()
        cells.setdefault(_name(r), {}).setdefault(job, []).append(_price(r, job, options))
    order = sorted(cells, key=lambda name: next(_total(r) for r in found if _name(r) == name))
    lines = [_row("card", *JOBS.values()), "|---" * (len(JOBS) + 1) + "|"]
    lines += [_row(name, *("; ".join(cells[name].get(job, ["–"])) for job in JOBS)) for name in order]
    return "\n".join(lines) + "\n"


def _name(r: Record) -> str:
    return f"{r['devices']} x {r['chip']}"


def _total(r: Record) -> float:
    return r["devices"] * r["chip_memory"]


def _price(r: Record, job: str, options: list[str]) -> str:
    """Memory and forecast time of one job; the options that make it fit are named."""
    peak = r.get("peak", None)
    text = f"{peak / GIB:.1f} GiB" if peak is not None else f"{_device_memory(r).split(' of ')[0]} GiB"
    if not r["fits"]:
        return f"does not fit ({text})"
    seconds = r["floor_seconds"] / SHARE
    if job in ("draw", "chat"):
        text += f", {seconds:.0f} s" if seconds >= 10 else f", {seconds:.1f} s"
    else:
        text += f", {seconds * (ROUNDS if job.startswith('grpo') else STEPS) / 3600:.1f} h"
    return text + (f" (`{' '.join(options)}`)" if options else "")


def _host_memory(r: Record) -> str:
    return f"{r['memory']['host'] / GIB:.1f}" if r["memory"] else "–"


def compiled_table(found: list[Record]) -> str:
    """Memory, work and collectives of one device and step, from compiled programs."""
    lines = [
        _row(
            "what",
            "kernel",
            "memory of a device, GiB",
            "in host memory, GiB",
            "useful TFLOP, floor",
            "recomputed",
            "collectives sent, over the links",
            "mark",
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in _ordered(found):
        sent = sum(c["traffic"] for c in r["collectives"]) / 1e9
        lines.append(
            _row(
                f"`{r['command']}`",
                _kernel(r),
                _device_memory(r),
                _host_memory(r),
                f"{r['useful'] / r['devices'] / TERA:.0f}, {r['floor_seconds']:.2f} s",
                f"{r['recomputed']:+.0%}",
                f"{sent:.0f} GB, {r['link_seconds']:.2f} s",
                "compiled",
            )
        )
    return "\n".join(lines) + "\n"


def measured_table(found: list[Record]) -> str:
    """Steps that were timed."""
    if not found:
        return "\nNone yet.\n\n"
    lines = [
        _row(
            "what",
            "devices",
            "layers",
            "step, s",
            "tokens/s of a device",
            "useful share of the peak",
            "mark",
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for r in found:
        lines.append(
            _row(
                f"`{r['command']}`",
                r["topology"],
                str(r["layers"]),
                f"{r['step_seconds']:.3g}",
                f"{r['tokens_per_s']:,.0f}",
                "no peak is known" if r["mfu"] is None else f"{r['mfu']:.1%}",
                "measured",
            )
        )
    return "\n".join(lines) + "\n"


def rendered(text: str, found: list[Record]) -> str:
    """A document with its tables made anew."""
    steps = [r for r in found if r["mark"] == "compiled" and "programs" not in r]
    tables = {
        "compiled": compiled_table(steps),
        "measured": measured_table([r for r in found if r["mark"] == "measured"]),
        "prices": price_table([r for r in found if r["mark"] == "compiled"]),
    }

    def table(match: re.Match[str]) -> str:
        return match[1] + tables[match[2]] + match[3]

    return _TABLE.sub(table, text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is stale")
    check = parser.parse_args().check
    found, stale = records(), []
    for name in DOCUMENTS:
        path = REPOSITORY / name
        text = path.read_text("utf-8")
        if (new := rendered(text, found)) != text:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
