"""The colours of a page, for light and for dark screens."""

from __future__ import annotations

# Okabe and Ito's palette (2008): colour-blind readers can tell the colours apart. Brighter versions for dark pages.
SERIES_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b0548a", "#a87400", "#2a9bd6", "#55585f")
SERIES_DARK = ("#58b0ea", "#ff8f4d", "#2fc79b", "#e69ac5", "#f0c14b", "#93d3f5", "#b4b8c0")
# Reward colours from low over middle to high: vermilion and blue differ for colour-blind readers too.
_REWARD_LIGHT = ("#c43c06", "#f3f4f6", "#0f62ab")
_REWARD_DARK = ("#ff7f45", "#242a35", "#5cb0f5")
# Black or white text: the better of the two has a contrast of at least 4.58 with any shade.
_INKS = ("#000000", "#ffffff")
# Shades on either side of the middle.
LEVELS = 5


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colours #rrggbb, from 1 to 21, as WCAG 2 defines it."""
    bright, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def reward_colours(dark: bool = False) -> list[tuple[int, str, str]]:
    """(level, background, text colour) of every shade, from the lowest reward to the highest."""
    low, middle, high = _REWARD_DARK if dark else _REWARD_LIGHT
    shades = []
    for level in range(-LEVELS, LEVELS + 1):
        background = _mix(middle, high if level > 0 else low, (abs(level) / LEVELS) ** 0.85)
        shades.append((level, background, max(_INKS, key=lambda ink: contrast(ink, background))))
    return shades


def level_class(level: int) -> str:
    """The style of a shade."""
    return f"q{'m' if level < 0 else 'p' if level > 0 else ''}{abs(level)}"


def colour_rules() -> str:
    """The styles of lines and shades, in both settings."""

    def variables(dark: bool) -> str:
        series = "".join(f"--s{i}:{c};" for i, c in enumerate(SERIES_DARK if dark else SERIES_LIGHT))
        shades = "".join(
            f"--{level_class(level)}:{back};--{level_class(level)}-ink:{ink};"
            for level, back, ink in reward_colours(dark)
        )
        return f":root{{{series}\n{shades}}}\n"

    classes = "".join(f".s{i}{{--line:var(--s{i})}}\n" for i in range(len(SERIES_LIGHT)))
    for level, _, _ in reward_colours():
        name = level_class(level)
        classes += f".{name}{{background:var(--{name});color:var(--{name}-ink)}}\n"
    return f"{variables(False)}@media (prefers-color-scheme:dark){{{variables(True)}}}\n{classes}"


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _mix(first: str, second: str, share: float) -> str:
    pairs = zip(_channels(first), _channels(second), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _luminance(colour: str) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
