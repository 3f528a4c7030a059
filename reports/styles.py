"""Colour and marker of a backend: the same in a plot for a paper and on the page.

The colour is what the saved run says. The palette is Okabe and Ito's, whose colours stay apart for
colour-blind readers; each has its marker, which says the same again.
"""

from linear_vit.reports.saved.runs import Words

_MARKERS = {
    "#7f7f7f": "x",
    "#0072b2": "o",
    "#e69f00": "s",
    "#009e73": "^",
    "#d55e00": "D",
    "#cc79a7": "P",
}
# Of a whole model's attention, which is no backend.
_ATTENTION = {
    "original": "#7f7f7f",
    "baseline": "#0072B2",
    "linear": "#E69F00",
    "ripple": "#009E73",
    "hydra": "#D55E00",
}
# Of a sequence over processes: two shades an attention.
_OVER = {
    "linear, 1 process": "#E69F00",
    "linear, 2 processes": "#D55E00",
    "linear, 2 processes, by the model": "#D55E00",
    "softmax, 1 process": "#56B4E9",
    "softmax, 2 processes": "#0072B2",
}
# Of what has no colour, or one of its own, by the letters of its name.
_OTHER = (("#56B4E9", "v"), ("#F0E442", "*"), ("#000000", "h"))
# matplotlib's marker by its name in Observable Plot.
_SYMBOLS = {
    "x": "times",
    "o": "circle",
    "s": "square",
    "^": "triangle",
    "D": "diamond",
    "P": "cross",
    "v": "wye",
    "*": "star",
    "h": "hexagon",
}


def style(backend: str, words: Words) -> tuple[str, str]:
    """Colour and matplotlib marker of a backend, or of an attention (and its backend)."""
    colour, marker = _OTHER[sum(map(ord, backend)) % len(_OTHER)]
    known = _OVER.get(backend) or _ATTENTION.get(backend.partition(" ")[0])
    said = words.colour(backend) or known
    if said is None:
        return colour, marker
    return said, _MARKERS.get(said.lower(), marker)


def page_style(backend: str, words: Words) -> dict[str, str]:
    """The same colour and marker, as the page's plotting library names them."""
    colour, marker = style(backend, words)
    # Black is the colour of text, which a dark page turns over.
    return {"colour": "currentColor" if colour == "#000000" else colour, "symbol": _SYMBOLS[marker]}
