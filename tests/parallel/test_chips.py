"""The table of accelerators, and which of them is here."""

from __future__ import annotations

import dataclasses

from unichar_jax.parallel import chips


def test_the_peak_is_that_of_the_kind(monkeypatch):
    @dataclasses.dataclass
    class Device:
        device_kind: str

    for kind, peak in (("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H200", 989e12), ("cpu", None)):
        monkeypatch.setattr(chips.jax, "devices", lambda kind=kind: [Device(kind)])
        monkeypatch.setattr(chips.jax, "device_count", lambda: 4)
        chips.peak_flops.cache_clear()
        assert chips.peak_flops() == (None if peak is None else 4 * peak)
    chips.peak_flops.cache_clear()
