"""Draw how a token picks a row: `python docs/figures/method.py` writes docs/figures/method.svg. Needs nothing but
Python."""

from __future__ import annotations

from html import escape
from pathlib import Path

OUT = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 900, 470
# Names of the rows of the table; the class of each gives its colour. Row 0 is the base model.
ROWS = (("base model", "base"), ("math", "math"), ("code", "code"), ("free row", "free"))
# (request, its row, its tokens): one of them is the token that the picture follows.
REQUESTS = (("47+8+6?", 1, 4), ("rsxt(gcafd)?", 2, 5), ("hello", 0, 3))
# What the cells of a row look like: from weak to strong, made up.
CELLS = {
    "base": (0.55, 0.55, 0.55, 0.55, 0.55, 0.55),
    "math": (0.9, 0.35, 0.6, 0.75, 0.4, 0.6),
    "code": (0.4, 0.8, 0.5, 0.3, 0.95, 0.55),
    "free": (0.0,) * 6,
}
STYLE = """
  svg { font-family: system-ui, sans-serif; font-size: 14px }
  .card { fill: #ffffff; stroke: #c9ced6 } .ink { fill: #1c2230 } .soft { fill: #5a6374 }
  .line { stroke: #5a6374; fill: none }
  .box { fill: #eef1f5; stroke: #8a93a3 } .empty { fill: none; stroke: #8a93a3 } .tip { fill: #5a6374 }
  .base { fill: #6b7482 } .math { fill: #0072b2 } .code { fill: #d55e00 } .free { fill: none }
  .picked { stroke: #0072b2; fill: none }
  .small { font-size: 12px } .bold { font-weight: 600 } .mono { font-family: ui-monospace, monospace }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1e222b; stroke: #3a4150 } .ink { fill: #eef1f6 } .soft { fill: #aab3c2 } .line { stroke: #aab3c2 }
    .box { fill: #2a303c; stroke: #7a8497 } .empty { stroke: #7a8497 } .tip { fill: #aab3c2 }
    .base { fill: #9aa4b5 } .math { fill: #56b4e9 } .code { fill: #f0a35e } .picked { stroke: #56b4e9 }
  }
"""


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def box(x: float, y: float, w: float, h: float, kind: str = "box", opacity: float = 1) -> str:
    faint = "" if opacity == 1 else f' fill-opacity="{opacity}"'
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="3" class="{kind}"{faint}/>'


def line(points: str, kind: str = "line", tip: bool = True) -> str:
    end = ' marker-end="url(#tip)"' if tip else ""
    return f'<polyline points="{points}" class="{kind}" stroke-width="1.8"{end}/>'


def strip(x: float, y: float, kind: str, cell: int = 22) -> str:
    """Six components as cells, the stronger the fuller."""
    cells = (box(x + i * cell, y, cell - 3, 20, kind, a) for i, a in enumerate(CELLS[kind]))
    frames = (box(x + i * cell, y, cell - 3, 20, "empty") for i in range(6))
    return "".join([*cells, *frames])


def pipeline() -> list[str]:
    """The upper half: one token goes through a layer."""
    y, out = (
        120,
        [
            text(28, 42, "One layer, one token", "ink bold"),
            text(28, 62, "V and U are frozen and shared by all experts; only the row differs", "soft small"),
        ],
    )
    out += [
        box(28, y - 24, 50, 48, "math"),
        text(53, y + 44, "x", "ink mono", "middle"),
        text(53, y + 60, "N numbers", "soft small", "middle"),
    ]
    out += [line(f"80,{y} 116,{y}")]
    out += [
        box(120, y - 34, 76, 68),
        text(158, y + 5, "V", "ink bold", "middle"),
        text(158, y + 52, "[N, R]", "soft small mono", "middle"),
    ]
    out += [line(f"198,{y} 234,{y}"), strip(240, y - 10, "base")]
    out += [text(305, y + 30, "h = x V", "ink mono", "middle"), text(305, y + 46, "R numbers", "soft small", "middle")]
    out += [
        line(f"376,{y} 408,{y}"),
        f'<circle cx="424" cy="{y}" r="14" class="box"/>',
        text(424, y + 5, "×", "ink bold", "middle"),
    ]
    out += [line(f"440,{y} 472,{y}"), strip(478, y - 10, "math"), text(543, y + 30, "g", "ink mono", "middle")]
    out += [
        line(f"614,{y} 648,{y}"),
        box(652, y - 34, 76, 68),
        text(690, y + 5, "Uᵀ", "ink bold", "middle"),
        text(690, y + 52, "[R, M]", "soft small mono", "middle"),
    ]
    out += [
        line(f"730,{y} 762,{y}"),
        f'<circle cx="778" cy="{y}" r="14" class="box"/>',
        text(778, y + 5, "+", "ink bold", "middle"),
    ]
    out += [line(f"778,{y - 62} 778,{y - 17}"), text(778, y - 70, "x Wᵀ (delta form)", "soft small", "middle")]
    out += [
        line(f"794,{y} 820,{y}"),
        box(824, y - 24, 50, 48, "math"),
        text(849, y + 44, "y", "ink mono", "middle"),
        text(849, y + 60, "M numbers", "soft small", "middle"),
    ]
    return out


def batch_and_table() -> list[str]:
    """The lower half: the batch, its row numbers, and the table of rows."""
    out = [
        text(28, 238, "A batch with several experts", "ink bold"),
        text(28, 257, "each token carries the number of a row", "soft small"),
    ]
    names = [kind for _, kind in ROWS]
    for i, (prompt, row, tokens) in enumerate(REQUESTS):
        y = 278 + 54 * i
        out += [text(28, y + 15, prompt, "ink mono small")]
        for t in range(tokens):
            out += [
                box(132 + 30 * t, y, 26, 22, names[row], 0.25),
                text(145 + 30 * t, y + 15, str(row), "ink mono small", "middle"),
            ]
    out += [text(132, 278 + 54 * 2 + 42, "expert_ids", "soft small mono")]
    top = 278
    out += [text(400, 238, "The table: scale", "ink bold"), text(400, 257, "one row for each expert", "soft small")]
    for i, (name, kind) in enumerate(ROWS):
        y = top + 36 * i
        out += [
            text(408, y + 15, str(i), "soft mono small", "end"),
            text(420, y + 15, name, "soft small" if kind == "free" else "ink"),
        ]
        out += [strip(506, y, kind)]
    y1 = top + 36 + 10
    # From the first token of the first request to row 1, and from row 1 up to the product.
    out += [box(130, 276, 30, 26, "picked"), box(502, top + 33, 136, 26, "picked")]
    out += [line(f"250,289 330,289 330,{y1} 392,{y1}", "picked")]
    out += [line(f"638,{y1} 656,{y1} 656,200 424,200 424,137", "picked")]
    out += [text(676, 292, "A new expert is a new row."), text(676, 314, "A mixture is one more row.")]
    out += [text(676, 336, "Without an expert: row 0.")]
    out += [text(676, 366, "factored form: row = σ · z", "soft mono small")]
    out += [text(676, 386, "delta form: row = σ · (z − 1)", "soft mono small")]
    return out


def draw() -> str:
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    )
    marker += '<path d="M0 0 L8 4 L0 8 z" class="tip"/></marker></defs>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = (
        "<title>A token of the batch carries the number of a row; the row scales the R numbers between V and U.</title>"
    )
    card = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" class="card"/>'
    return "\n".join(
        [head, title, f"<style>{STYLE}</style>", marker, card, *pipeline(), *batch_and_table(), "</svg>", ""]
    )


if __name__ == "__main__":
    OUT.write_text(draw())
    print(f"wrote {OUT.name}")
