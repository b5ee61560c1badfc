"""Manifests: what was computed from what, and in which words two of them differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

# What a manifest says for people alone; it decides nothing.
ABOUT = "about"


def differences(have: Mapping[str, Any], wanted: Mapping[str, Any], now: str) -> str:
    """Say what differs between two manifests; entries of inner dicts one by one.

    A computation is `{"program": hash, "constants": hash, "about": {...}}`, losses that are compared to rounding are
    `{"rows": fingerprint, "tolerance": t, "losses": ["0.5", ...]}`, compared where they are of the same rows.

    Example:
      >>> differences({"dim": 8, "versions": {"jax": "0.9"}}, {"dim": 9, "versions": {"jax": "0.9"}}, "now")
      'dim: 8 in the store, 9 now'
      >>> before = {"program": "aa", "constants": "bb", "about": {"constants": ["float32[] 1.0"]}}
      >>> after = {"program": "aa", "constants": "cc", "about": {"constants": ["float32[] 2.0"]}}
      >>> differences({"objective": before}, {"objective": after}, "now")
      'objective: the same program with other constants, float32[] 1.0 in the store, float32[] 2.0 now'
    """
    return "; ".join(_told(have, wanted, now, ""))


def _told(have: Mapping[str, Any], wanted: Mapping[str, Any], now: str, prefix: str) -> list[str]:
    told: list[str] = []
    for name in {**have, **wanted}:
        before, after, key = have.get(name), wanted.get(name), f"{prefix}{name}"
        if name == ABOUT or before == after:
            continue
        if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
            told.append(f"{key}: {_word(before)} in the store, {_word(after)} {now}")
        elif "program" in before:
            told += _programs(key, before, after, now)
        elif "losses" in before:
            told += _losses(key, before, after, now)
        else:
            told += _told(before, after, now, "version of " if name == "versions" else f"{key} ")
    return told


def _word(value: Any) -> str:
    if value is None or isinstance(value, Mapping):
        return "None" if value is None else "a program"
    return json.dumps(value, sort_keys=True)


def _programs(key: str, before: Mapping[str, Any], after: Mapping[str, Any], now: str) -> list[str]:
    """Say how two computations differ: in what they are called, if that helps, and in their first constants."""
    same = before["program"] == after["program"]
    if same and before["constants"] == after["constants"]:
        return []
    old, new = before[ABOUT], after[ABOUT]
    pairs = [
        (f"{name} {old.get(name)}", new[name]) for name in new if name != "constants" and old.get(name) != new[name]
    ]
    if same and not pairs:
        pairs = [pair for pair in zip(old["constants"], new["constants"], strict=False) if pair[0] != pair[1]][:1]
    details = "".join(f", {one} in the store, {other} {now}" for one, other in pairs)
    what = "the same program with other constants" if same else "another program"
    return [f"{key}: {what}{details or ' than in the store'}"]


def _losses(key: str, before: Mapping[str, Any], after: Mapping[str, Any], now: str) -> list[str]:
    """Say how losses of the same rows differ by more than rounding; those of other rows say nothing."""
    if before["rows"] != after["rows"]:
        return []
    old, new = ([float(loss) for loss in it["losses"]] for it in (before, after))
    scale = max((abs(loss) for loss in [*old, *new] if math.isfinite(loss)), default=0.0)
    if len(old) == len(new) and all(map(_close, old, new, [after["tolerance"] * scale] * len(old))):
        return []
    return [f"{key}: {_listed(old)} in the store, {_listed(new)} {now}"]


def _close(one: float, other: float, tolerance: float) -> bool:
    if math.isfinite(one) and math.isfinite(other):
        return abs(one - other) <= tolerance
    return repr(one) == repr(other)


def _listed(losses: Sequence[float]) -> str:
    return "[" + ", ".join(f"{loss:.6g}" for loss in losses) + "]"
