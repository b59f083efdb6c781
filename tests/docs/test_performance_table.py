"""The tables of speed and memory say what the records say, and notice when they do not."""

from __future__ import annotations

import copy
import runpy

import pytest

from tests.docs.checker import REPOSITORY

SCRIPT = runpy.run_path(str(REPOSITORY / "scripts" / "performance_table.py"))
RECORDS = SCRIPT["records"]()


@pytest.mark.parametrize("document", SCRIPT["DOCUMENTS"])
def test_documents_and_records_agree(document):
    text = (REPOSITORY / document).read_text("utf-8")
    assert SCRIPT["_TABLE"].search(text)
    again = "run python scripts/performance_table.py"
    assert SCRIPT["rendered"](text, RECORDS) == text, again


def test_another_record_is_another_table():
    text = (REPOSITORY / "README.md").read_text("utf-8")
    for change in (
        lambda r: r["mark"] == "compiled" and "memory" in r and r["memory"].update(temporaries=2**35),
        lambda r: "programs" in r and r.update(peak=2**33),
        lambda r: "programs" in r and r.update(fits=False),
    ):
        other = copy.deepcopy(RECORDS)
        assert any([change(r) is None for r in other])
        assert SCRIPT["rendered"](text, other) != text


def test_what_the_documents_promise_fits():
    fits = {
        (r["command"].split()[2], r["topology"]) for r in RECORDS if r["mark"] == "compiled" and r["fits"]
    }
    assert {("sft-bagel-7b", t) for t in ("v5e:8x8", "v5p:2x2x2", "v6e:4x4", "h200:1x1x8")} <= fits
    assert {("sft-lora-bagel-7b", t) for t in ("v5e:2x4", "h200:1x1x1")} <= fits
    assert ("grpo-bagel-7b", "h100:1x1x1") in fits
    assert ("chat", "rtx4090:1x1x1") in fits
    for r in RECORDS:
        if r["mark"] == "compiled" and "programs" not in r:
            assert r["proven"] and sum(r["capacities"]) == 12_288
            assert r["parameters"] > 14e9
            # A device keeps the sum of its own shard of a gradient: all of them in bfloat16 would be much more than
            # what is summed whole, which are small weights (a sum that pads with zeros gathers, too) and scales.
            summed = sum(c["payload"] for c in r["collectives"] if c["kind"] == "all-reduce")
            assert summed < 0.1 * 2 * r["trained"]
