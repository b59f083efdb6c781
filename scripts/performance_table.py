"""Writes the tables of speed and memory in README.md and docs/performance.md from the records of ``unichar bench``.

A table stands between ``<!-- benchmarks: KIND -->`` and ``<!-- end -->``, where KIND is compiled, measured, or
memory (of compiled programs, and no more); everything between them is replaced. Records are in docs/benchmarks,
one file for each kind of device.

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
_TABLE = re.compile(r"(<!-- benchmarks: (compiled|measured|memory) -->\n).*?(<!-- end -->)", re.DOTALL)

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


def memory_table(found: list[Record]) -> str:
    """What fits where."""
    lines = [
        _row("`unichar plan` ...", "memory of a device, GiB", "of its host", "kernel", "mark"),
        "|---|---|---|---|---|",
    ]
    for r in _ordered(found):
        command = r["command"].removeprefix("unichar plan ")
        lines.append(_row(f"`{command}`", _device_memory(r), _host_memory(r), _kernel(r), "compiled"))
    return "\n".join(lines) + "\n"


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
    make = {"compiled": compiled_table, "measured": measured_table, "memory": memory_table}

    def table(match: re.Match[str]) -> str:
        mark = "compiled" if match[2] == "memory" else match[2]
        return match[1] + make[match[2]]([r for r in found if r["mark"] == mark]) + match[3]

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
