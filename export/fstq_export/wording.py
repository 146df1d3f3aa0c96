"""How the report words numbers and foreign text. Pure functions."""

from __future__ import annotations

import re
import unicodedata


def visible(text: str) -> str:
    """Text in which control, format, surrogate and unassigned characters are spelled out; newline and tab get signs."""

    def show(character: str) -> str:
        # Joiners shape letters in many scripts and reorder nothing, so they stay.
        hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")
        if not hidden or character in "\u200c\u200d":
            return character
        return {"\n": "↵", "\t": "⇥"}.get(character, f"⟨U+{ord(character):04X}⟩")

    return text if text.isascii() and text.isprintable() else "".join(map(show, text))


def percent(share: float) -> str:
    """0.125 -> "12.5 %", three digits at most and no more than two decimals."""
    value = round(share * 100, 2) or 0.0
    return f"{value:,.0f} %" if abs(value) >= 100 else f"{value:.3g} %"


def typeset(text: str) -> str:
    """Real minus signs, and no line break before a unit."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return re.sub(r"(?<=\d) (?=%|[kMG]?i?B\b|min\b|s\b|ms\b)", "\u00a0", text)


def size(count: int) -> str:
    """Bytes in the largest binary unit that keeps the number above 1."""
    power = min(3, max(0, (count.bit_length() - 1) // 10))
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def seconds(seconds: float) -> str:
    """0.00421 -> "4.21 ms", 0.25 -> "250 ms", 12.34 -> "12.3 s", 150 -> "2 min 30 s"."""
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"
