"""Where the time of a run went, as a line for people; the phases are those of the trainer and of the hooks."""

from __future__ import annotations

from collections.abc import Mapping

from graf.runtime.phase_timer import REST

#: what phases are called
TITLES = {
    "data": "photographs",
    "inputs": "random numbers",
    "render": "shared render",
    "d": "discriminator",
    "r1": "gradient penalty",
    "g": "generator",
    "sr": "super-resolution",
    "update": "optimisers",
    "ema": "averages",
    "log": "logging",
    "sample": "sample grids",
    "score": "scoring",
    "save": "saving",
    "release_cache": "freeing memory",
    REST: REST,
}
#: shares of the time below which a phase belongs to the rest
LEAST_SHARE = 0.005


def describe_time(seconds: Mapping[str, float]) -> str:
    """Seconds by phase -> "83.2 s: generator 41%, ..., rest 2%", the longest first."""
    total = sum(seconds.values())
    named = {name: taken for name, taken in seconds.items() if name != REST and taken >= LEAST_SHARE * total}
    shown = dict(sorted(named.items(), key=lambda phase: -phase[1])) | {REST: total - sum(named.values())}
    return f"{total:.1f} s: " + ", ".join(f"{TITLES[name]} {taken / total:.0%}" for name, taken in shown.items())
