"""Draw the pictures of docs/walkthrough.md: `python docs/draw.py` writes docs/pictures/*.svg.

Each file carries both sets of colours and takes the dark one where the reader's system asks for it. Blue is frozen,
orange is trained, and the two are told apart without colours by the border: trained things have a dashed one.
`--dark FOLDER` writes the dark set alone, for programs that draw SVG and know no `prefers-color-scheme`.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"

# class -> CSS, once on light and once on dark; {0} is the only thing that differs: its colours.
_LIGHT = {"paper": "#ffffff", "ink": "#1b1f24", "quiet": "#5c6670", "frozen": "#d6e6f5", "frozen-edge": "#2f6ca8"}
_LIGHT |= {"trained": "#fde2c8", "trained-edge": "#b84e00", "plain": "#eef0f2", "back": "#b0125b", "zero": "#f7f8f9"}
_DARK = {"paper": "#14181d", "ink": "#e8ebee", "quiet": "#a3adb8", "frozen": "#1d3a56", "frozen-edge": "#6fb0ee"}
_DARK |= {"trained": "#57320f", "trained-edge": "#ff9d4d", "plain": "#2a3038", "back": "#ff7eb6", "zero": "#1b2026"}


def _rules(colours: dict[str, str]) -> str:
    c = colours
    return "".join(
        [
            f".paper{{fill:{c['paper']}}}",
            f"text{{fill:{c['ink']}}}",
            f"text.quiet{{fill:{c['quiet']}}}",
            f"text.back{{fill:{c['back']}}}",
            f".frozen{{fill:{c['frozen']};stroke:{c['frozen-edge']}}}",
            f".trained{{fill:{c['trained']};stroke:{c['trained-edge']};stroke-dasharray:5 2}}",
            f".plain{{fill:{c['plain']};stroke:{c['quiet']}}}",
            f".zero{{fill:{c['zero']};stroke:{c['quiet']};stroke-dasharray:1 3}}",
            f".line{{stroke:{c['ink']};fill:none}}",
            f".line-back{{stroke:{c['back']};fill:none}}",
            f".tip{{fill:{c['ink']};stroke:none}}",
            f".tip-back{{fill:{c['back']};stroke:none}}",
        ]
    )


class Picture:
    """An SVG that is written line by line; lengths in pixels, the origin at the upper left."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, w: float, h: float, kind: str = "plain", label: str = "", size: int = 13) -> None:
        """A rectangle with a label in its middle; `kind` is frozen, trained, plain or zero."""
        radius = 4 if min(w, h) > 20 else 0
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" stroke-width="1.4"/>'
        )
        if label:
            self.text(x + w / 2, y + h / 2 + size * 0.36, label, size, "middle")

    def text(self, x: float, y: float, words: str, size: int = 13, anchor: str = "start", kind: str = "") -> None:
        """One line of text, its baseline at y; `kind` adds classes: quiet, back, mono, bold."""
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def arrow(self, *points: tuple[float, float], back: bool = False) -> None:
        """A line through the points with a tip at the last; `back` is the colour of gradients."""
        kind = "-back" if back else ""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        foot = x1 - 8 * ux, y1 - 8 * uy
        path = " L".join(f"{x:g} {y:g}" for x, y in (*points[:-1], foot))
        self.parts.append(f'<path class="line{kind}" d="M{path}" stroke-width="1.6"/>')
        corners = [(x1, y1), (foot[0] - 4 * uy, foot[1] + 4 * ux), (foot[0] + 4 * uy, foot[1] - 4 * ux)]
        self.parts.append(f'<path class="tip{kind}" d="M{" L".join(f"{x:g} {y:g}" for x, y in corners)} Z"/>')

    def svg(self, dark_only: bool = False) -> str:
        """The whole file."""
        style = "text{font-family:Helvetica,Arial,DejaVu Sans,sans-serif}"
        style += ".mono{font-family:Menlo,Consolas,DejaVu Sans Mono,monospace}.bold{font-weight:bold}"
        style += _rules(_DARK if dark_only else _LIGHT)
        if not dark_only:
            style += f"@media (prefers-color-scheme: dark){{{_rules(_DARK)}}}"
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" role="img">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{style}</style>",
                f'<rect class="paper" width="{self.width}" height="{self.height}" rx="8"/>',
                *self.parts,
                "</svg>\n",
            ]
        )

    def legend(self, x: float, y: float) -> None:
        """What the two colours mean."""
        self.box(x, y, 26, 14, "frozen")
        self.text(x + 33, y + 12, "frozen")
        self.box(x + 95, y, 26, 14, "trained")
        self.text(x + 128, y + 12, "trained")


def sentence() -> Picture:
    """One sentence's way, with the shape after each stage."""
    picture = Picture(900, 780, "One sentence's way through RoBERTa-base with LoRA, and the shape after each stage")
    picture.legend(700, 20)
    picture.text(24, 32, '"Oil prices rise as OPEC cuts output"', 15, kind="bold")
    tokens = ["<s>", "Oil", "Ġprices", "Ġrise", "Ġas", "ĠOPEC", "Ġcuts", "Ġoutput", "</s>"]
    ids = [0, 32397, 850, 1430, 25, 9349, 2599, 4195, 2]
    for i, (token, number) in enumerate(zip(tokens, ids, strict=True)):
        picture.box(24 + 72 * i, 50, 66, 40)
        picture.text(57 + 72 * i, 67, token, 12, "middle")
        picture.text(57 + 72 * i, 83, str(number), 11, "middle", "quiet mono")
    picture.text(684, 75, "input_ids (1, 9)", 12, kind="mono")
    rows = [
        ("embeddings", "frozen", (9, 768), "word + position + type, LayerNorm"),
        ("attention.self: q, k, v", "frozen", (9, 2304), "one matmul, three blocks, LoRA beside it"),
        ("attention.output", "frozen", (9, 768), "softmax(q kᵀ / 8) v, W_o, + input, LayerNorm"),
        ("intermediate", "frozen", (9, 3072), "W_1, GELU"),
        ("output", "frozen", (9, 768), "W_2, + input, LayerNorm"),
        ("layer 11: the same, <s> alone", "frozen", (1, 768), "its query asks all nine keys and values"),
        ("classifier", "trained", (1, 4), "dense, tanh, out_proj: four logits"),
        ("cross-entropy", "plain", (1, 1), "loss = -log softmax(logits)[label]"),
    ]
    y, previous = 128, 90
    for name, kind, (count, width), what in rows:
        if name.startswith(("layer", "classifier")):
            y += 20
        picture.arrow((164, previous), (164, y))
        picture.box(54, y, 220, 42, kind, name)
        if "LoRA" in what or name.startswith("layer"):
            picture.box(282, y + 4, 34, 34, "trained", "A B")
        # What comes out, to scale: a row a token, 10 numbers a pixel.
        height = 3.4 * count
        picture.box(340, y + 21 - height / 2, max(width / 10, 3), height, "plain")
        shape = f"(1, {count}, {width})" if kind == "frozen" else "(1, 4)" if kind == "trained" else "()"
        beside = 352 + max(width / 10, 3)
        picture.text(beside, y + 19, shape, 12, kind="mono")
        picture.text(beside, y + 35, what, 11, kind="quiet")
        previous = y + 42
        y += 76
        if name == "output":
            # Eleven times through the four boxes above.
            picture.parts.append(f'<path class="line" stroke-width="1.2" d="M40 {y - 34} H26 V{y - 4 * 76 - 4} H40" />')
            picture.text(18, y - 180, "11 layers", 12, "middle", "quiet")
            picture.parts[-1] = picture.parts[-1].replace("<text", f'<text transform="rotate(-90 18 {y - 180})"')
    return picture


def lora() -> Picture:
    """LoRA on one matmul and on the three packed blocks."""
    picture = Picture(900, 590, "LoRA on one matmul, and on three packed blocks")
    picture.legend(700, 20)
    side, thin, rows = 108, 14, 42  # pixels for 768 numbers, for rank 6 (drawn too wide to be seen), for n tokens
    picture.text(24, 32, "One block:  y = x Wᵀ + s · x Aᵀ Bᵀ", 15, kind="bold")

    def matrix(x: float, y: float, w: float, h: float, kind: str, name: str, shape: str) -> None:
        """A matrix to scale with its name above and its shape below."""
        picture.box(x, y, w, h, kind)
        picture.text(x + w / 2, y - 7, name, 13, "middle")
        picture.text(x + w / 2, y + h + 16, shape, 11, "middle", "quiet mono")

    def sign(x: float, y: float, what: str) -> None:
        picture.text(x, y + 6, what, 18, "middle")

    middle = 130
    matrix(30, middle - rows / 2, side, rows, "plain", "y", "n × 768")
    sign(158, middle, "=")
    matrix(178, middle - rows / 2, side, rows, "plain", "x", "n × 768")
    sign(303, middle, "·")
    matrix(320, middle - side / 2, side, side, "frozen", "Wᵀ", "768 × 768")
    sign(455, middle, "+  s ·")
    matrix(490, middle - rows / 2, side, rows, "plain", "x", "n × 768")
    sign(613, middle, "·")
    matrix(636, middle - side / 2, thin, side, "trained", "Aᵀ", "768 × 6")
    sign(675, middle, "·")
    matrix(694, middle - thin / 2, side, thin, "trained", "Bᵀ", "6 × 768")
    picture.text(870, 222, "x Aᵀ is all that the update knows of x: 6 numbers a token", 12, "end", "quiet")

    picture.text(24, 282, "Query, key and value on the same x: two products more, not six", 15, kind="bold")
    y, names = 345, ("q", "k", "v")
    for i, name in enumerate(names):
        picture.box(30 + side * i, y, side, rows, "plain", name)
    picture.text(30 + 1.5 * side, y + rows + 16, "n × 2304", 11, "middle", "quiet mono")
    sign(378, y + rows / 2, "=")
    matrix(398, y, side, rows, "plain", "x", "n × 768")
    sign(522, y + rows / 2, "·")
    for i, name in enumerate(names):
        picture.box(540 + side * i, y - 33, side, side, "frozen", f"W_{name}ᵀ")
    picture.text(540 + 1.5 * side, y + side - 16, "768 × 2304, stacked", 11, "middle", "quiet mono")
    y = 508
    sign(378, y, "+")
    matrix(398, y - rows / 2, side, rows, "plain", "x", "n × 768")
    sign(522, y, "·")
    for i, name in enumerate(names):
        picture.box(540 + (thin + 4) * i, y - side / 2 + 6, thin + 4, side - 12, "trained")
        picture.text(549 + (thin + 4) * i, y - side / 2, f"A{name}ᵀ", 9, "middle")
    picture.text(567, y + side / 2 + 12, "768 × 18", 11, "middle", "quiet mono")
    sign(612, y, "·")
    block = (864 - 630) / 3
    for i, name in enumerate(names):
        for j in range(3):
            kind = "trained" if i == j else "zero"
            label = f"s B{name}ᵀ" if i == j else "0"
            picture.box(630 + block * j, y - 33 + 22 * i, block, 22, kind, label, 11)
    picture.text(630 + 1.5 * block, y + 50, "18 × 2304, block-diagonal", 11, "middle", "quiet mono")
    return picture


def gradients() -> Picture:
    """Where gradients flow, and what is frozen."""
    picture = Picture(900, 640, "Where gradients flow: into A, B and the head; through frozen weights; no further down")
    picture.legend(700, 20)
    picture.text(24, 32, "The whole model, with adapters in layers 2 to 5 (the quickstart)", 15, kind="bold")
    stages = [
        ("embeddings", "frozen", 24),
        ("layers 0, 1", "frozen", 164),
        ("layer 2", "frozen", 304),
        ("layers 3 – 5", "frozen", 444),
        ("head", "trained", 584),
        ("loss L", "plain", 724),
    ]
    y, width = 90, 104
    for i, (name, kind, x) in enumerate(stages):
        picture.box(x, y, width, 54, kind, name)
        if name in ("layer 2", "layers 3 – 5"):
            picture.box(x + 32, y + 100, 40, 30, "trained", "A B")
            picture.arrow((x + 52, y + 54), (x + 52, y + 100), back=True)
        if i:
            picture.arrow((x - 36, y + 16), (x, y + 16))
        if name in ("layers 3 – 5", "head", "loss L"):
            picture.arrow((x, y + 40), (x - 36, y + 40), back=True)
    picture.text(24, y - 12, "forward", 12)
    picture.text(828, y + 90, "backward", 12, "end", "back")
    picture.text(24, 206, "nothing flows here: below the lowest", 12, kind="quiet")
    picture.text(24, 222, "adapter there is nothing to train", 12, kind="quiet")
    picture.text(530, 206, "through frozen weights: dL/dX = G W is needed,", 12, kind="quiet")
    picture.text(530, 222, "dL/dW is not computed", 12, kind="quiet")

    title = "One adapted matmul,  Y = X Wᵀ + s X Aᵀ Bᵀ  (sizes of RoBERTa-base; bias not shown)"
    picture.text(24, 285, title, 15, kind="bold")
    top, low = 340, 440
    picture.box(40, top, 90, 44, "plain", "X")
    picture.box(310, top, 150, 44, "frozen", "W")
    picture.box(230, low, 110, 44, "trained", "A")
    picture.box(440, low, 110, 44, "trained", "B")
    picture.box(640, top, 44, 44, "plain", "+")
    picture.box(770, top, 90, 44, "plain", "Y")
    picture.arrow((130, top + 14), (310, top + 14))
    picture.arrow((460, top + 14), (640, top + 14))
    picture.arrow((684, top + 14), (770, top + 14))
    picture.arrow((85, top + 44), (85, low + 14), (230, low + 14))
    picture.arrow((340, low + 14), (440, low + 14))
    picture.arrow((550, low + 14), (655, low + 14), (655, top + 44))
    picture.text(390, low + 8, "X Aᵀ", 12, "middle")
    picture.text(602, low + 8, "· s", 12, "middle")
    # The way back.
    picture.arrow((770, top + 32), (684, top + 32), back=True)
    picture.text(727, top + 62, "G = dL/dY", 12, "middle", "back")
    picture.arrow((640, top + 32), (460, top + 32), back=True)
    picture.arrow((310, top + 32), (130, top + 32), back=True)
    picture.text(220, top + 52, "G W", 12, "middle", "back")
    picture.arrow((672, top + 44), (672, low + 32), (550, low + 32), back=True)
    picture.arrow((440, low + 32), (340, low + 32), back=True)
    picture.text(390, low + 50, "s G B", 12, "middle", "back")
    picture.arrow((230, low + 32), (62, low + 32), (62, top + 44), back=True)
    picture.text(146, low + 50, "s G B A", 12, "middle", "back")
    picture.arrow((285, low + 44), (285, 540), back=True)
    picture.text(285, 560, "dL/dA = s Bᵀ Gᵀ X", 14, "middle", "back")
    picture.text(285, 580, "(6, 768);  zero while B is", 12, "middle", "quiet")
    picture.arrow((495, low + 44), (495, 540), back=True)
    picture.text(495, 560, "dL/dB = s Gᵀ X Aᵀ", 14, "middle", "back")
    picture.text(495, 580, "(768, 6)", 12, "middle", "quiet")
    picture.text(385, top - 10, "no arrow down: dL/dW = Gᵀ X is never formed", 12, "middle", "quiet")
    picture.text(24, 618, "To the layer below goes dL/dX = G W + s G B A.", 13)
    return picture


PICTURES = {"sentence": sentence, "lora": lora, "gradients": gradients}


def main(arguments: list[str]) -> int:
    """Write the pictures. Returns the exit code."""
    if arguments and (len(arguments) != 2 or arguments[0] != "--dark"):
        print("usage: python docs/draw.py [--dark FOLDER]", file=sys.stderr)
        return 2
    folder = Path(arguments[1]) if arguments else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(dark_only=bool(arguments)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
