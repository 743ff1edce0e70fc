"""
What the pages of report.py, pool_page.py and eval_page.py are made of: escaped markup, numbers that may be missing,
charts whose text keeps its size at every width, and the stylesheet. Nothing here knows what a page is about, but for the
colours and families of languages.
"""

import math
from html import escape

from languages import CLUSTERS, LANGUAGES, SHARED

RIGHT_TO_LEFT = ("ar", "fa", "he")
OPEN_FIRST = ("ar", "hi", "ja", "he", "de", "fa")  # languages whose samples are unfolded when the page loads

# Control characters are shown by their pictures; half a surrogate pair, which no file can hold, as a broken character
PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | dict.fromkeys(
    (*range(0x7F, 0xA0), *range(0xD800, 0xE000)), 0xFFFD)


# ---------------------------------------------------------------------------------------------------------------------
# markup, numbers, names

class Html(str):
    """Markup that is safe as it stands. Every other string is text, and h() escapes it."""


def safe(text):
    """Text for a page: markup escaped, and what a file or a screen cannot show replaced by PICTURES."""
    return escape(str(text)).translate(PICTURES)


def h(tag, *children, **attributes):
    """h("p", "a < b", class_="x") -> <p class="x">a &lt; b</p>. Lists are flattened, a None is left out."""
    def inner(child):
        if isinstance(child, (list, tuple)):
            return "".join(map(inner, child))
        return "" if child is None else child if isinstance(child, Html) else safe(child)
    shown = [f' {k.rstrip("_").replace("_", "-")}="{safe(v)}"' for k, v in attributes.items() if v is not None]
    return Html(f"<{tag}{''.join(shown)}>{inner(children)}</{tag}>")


def number(tree, *path):
    """The finite number at tree[a][b][c], else None: what is missing, null or NaN is not drawn."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree if isinstance(tree, (int, float)) and math.isfinite(tree) else None


def branch(tree, *path):
    """The dictionary at tree[a][b][c], else {}: what is missing or null has nothing in it."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def win_rate(tree, *path):
    """The [mean, low, high] at a path, else None."""
    values = [number(tree, *path, i) for i in range(3)]
    return None if None in values else values


def text_of(tree, field):
    """The string at tree[field], else None; empty is none."""
    return tree[field] if isinstance(tree.get(field), str) and tree[field] else None


def percent(value, digits=1):
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def plain(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def count(value, one=None, many=None):
    """1234 -> "1,234", with a noun "1 prompt", "1,234 prompts"; None -> "–"."""
    return "–" if value is None else f"{value:,.0f}" + (f" {one if value == 1 else many or one + 's'}" if one else "")


def duration(s):
    return "–" if s is None else f"{s:.0f} s" if s < 100 else f"{s / 60:.1f} min" if s < 6000 else f"{s / 3600:.1f} h"


def win_text(win):
    return [percent(win[0]), " ", h("small", f"{100 * win[1]:.1f}–{100 * win[2]:.1f}")] if win else "–"


def points(before, after):
    """The change in percentage points, green or red; None if either is missing."""
    change = None if None in (before, after) else round(100 * (after - before), 1)
    side = "good" if change and change > 0 else "bad" if change else None
    return None if change is None else [" ", h("small", f"{change:+.1f}".replace("-", "−"), class_=side)]


def name_of(code):
    return LANGUAGES.get(code, (code,))[0]


def name(text):
    """A name inside a sentence: one that runs to the left does not turn the sentence round."""
    return h("bdi", text)


def listed(parts):
    """[a, b, c] -> a, b, c; for h()."""
    return [[", " if i else "", part] for i, part in enumerate(parts)]


def colour_of(teacher):
    """A CSS colour for each cluster's teacher; teachers of other pools share the last one."""
    names, name = list(CLUSTERS), teacher.removeprefix("teacher-")
    return f"var(--t{names.index(name) if name in names else len(names)})"


def families(codes):
    """Languages by the teacher that owns them: [(title, colour or None, codes)]; nobody is left out."""
    groups = [("Shared", None, SHARED), ("Others", None, [c for c in codes if c not in LANGUAGES])]
    groups[1:1] = [(t.capitalize(), colour_of(t), [c for c in own if c not in SHARED]) for t, own in CLUSTERS.items()]
    return [(title, colour, here) for title, colour, own in groups if (here := [c for c in own if c in codes])]


def in_order(codes):
    """Languages in the order of their families; those of none by their codes."""
    return [c for _, _, group in families(sorted(codes)) for c in group]


# ---------------------------------------------------------------------------------------------------------------------
# charts: rows of label | SVG | value. Horizontal positions are percentages, so text keeps its size at every width

class Axis:
    """A horizontal scale from low to high with five ticks, the one in the middle strong if it means something."""

    def __init__(self, low=0.0, high=1.0, middle="grid", show=lambda v: percent(v, 0)):
        self.low, self.high, self.show = low, high, show
        self.ticks = {low + (high - low) * i / 4: middle if i == 2 else "grid" for i in range(5)}  # value: CSS class

    def x(self, value):
        return f"{100 * (min(max(value, self.low), self.high) - self.low) / (self.high - self.low):.2f}%"

    def line(self, a, b, class_, y="50%", y2=None, style=None):
        return h("line", x1=self.x(a), x2=self.x(b), y1=y, y2=y2 or y, class_=class_, style=style)

    def dot(self, value, class_, style=None):
        return h("circle", cx=self.x(value), cy="50%", r=5, class_=class_, style=style) if value is not None else None

    def bar(self, a, b, colour, class_=None):
        return h("rect", x=self.x(a), width=self.x(self.low + b - a), y="50%", height=14, transform="translate(0 -7)",
                 class_=class_, style=f"color:{colour}")

    def change(self, a, b):
        """A dumbbell from before to after, or as much of it as is known."""
        line = self.line(a, b, "rise" if b >= a else "fall") if None not in (a, b) else None
        return [line, self.dot(a, "before"), self.dot(b, "after")]

    def duel(self, label, win, value=None, note=None, height=44):
        """A rate and its 95 % interval, [mean, low, high] or None; coloured where the interval leaves out one half."""
        side = "better" if win and win[1] > 0.5 else "worse" if win and win[2] < 0.5 else "even"
        marks = win and [self.line(win[1], win[2], f"interval {side}"), self.dot(win[0], side)]
        say = "{:.3f}, 95 % interval from {:.3f} to {:.3f}".format(*win) if win else "not judged"
        return self.row(label, marks, value or win_text(win), note, say, height)

    def row(self, label, marks, value, note=None, say=None, height=26):
        """`say` is the drawing in words: its tooltip, and its name for who cannot see it."""
        say = f"{label}: {say or value}"
        grid = [self.line(t, t, class_, "0", "100%") for t, class_ in self.ticks.items()]
        return h("div", h("div", label, note and h("small", note), class_="label"),
                 h("svg", h("title", say), grid, marks, role="img", aria_label=say, height=height),
                 h("div", value, class_="value"), class_="row" if marks else "row empty")

    def ruler(self, title=None, colour=None):
        """The numbers of the ticks, and a heading for the rows below."""
        texts = [h("text", self.show(t), x=self.x(t), y=14) for t in self.ticks]
        return h("div", h("div", colour and h("i", style=f"background:{colour}"), title, class_="label"),
                 h("svg", texts, height=20, aria_hidden="true"), class_="row ruler")


def zoomed(values):
    """An axis up to 100 % that starts at a multiple of 20 % below the smallest value."""
    return Axis(low=min(0.8, math.floor(5 * min(values, default=0)) / 5))


def around_half(wins):
    """An axis of win rates [mean, low, high] or None: one half in the middle, as wide as the widest needs."""
    far = max([0.1] + [abs(v - 0.5) for win in wins if win for v in win])
    far = min(0.5, math.ceil(10 * far - 1e-9) / 10)
    return Axis(0.5 - far, 0.5 + far, middle="mark")


def figure(title, caption, *parts):
    caption = h("figcaption", h("h3", title), h("p", caption))
    return h("figure", caption, h("div", parts), role="group", aria_label=title)


def duels(title, caption, named_wins):
    """Win rates [(label, [mean, low, high] or None, note...)]."""
    axis = around_half([win for _, win, *_ in named_wins])
    rows = [axis.duel(label, win, note=note[0] if note else None) for label, win, *note in named_wins]
    return figure(title, caption, axis.ruler(), rows) if any(win for _, win, *_ in named_wins) else None


def by_family(axis, codes, row):
    """The rows of all languages, each family under its own ruler; two columns where there is room."""
    return h("div", [h("div", axis.ruler(title, colour), [row(c) for c in codes if c in own], class_="group")
                     for title, colour, own in families(codes)], class_="columns")


def key(*items):
    """A legend of (CSS class or colour of a mark, what it means)."""
    marks = [h("i", style=f"background:{m}") if m.startswith("var") else h("i", class_=m) for m, _ in items]
    return h("p", [h("span", mark, text) for mark, (_, text) in zip(marks, items)], class_="key")


def tiles(*named):
    """The numbers to remember: (number, what it is), or None."""
    return h("div", [h("p", h("b", big), h("small", small)) for big, small in filter(None, named)], class_="tiles")


def quote(text, code, class_):
    """What a person or a model wrote: isolated from the text around it, its language and direction declared."""
    text = (text or [None])[-1] if isinstance(text, list) else text  # chat messages: the last one
    text = text.get("content") if isinstance(text, dict) else text
    text = "" if text is None else str(text)
    text = text if len(text) <= 300 else f"{text[:300]}… ({len(text)} characters)"
    return h("p", text or "(empty)", class_=class_, lang={"zh": "zh-Hans"}.get(code, code), dir="auto")


def card(prompt, code, answers):
    """A prompt and its answers side by side; in a language that runs to the left, so do they."""
    return h("article", quote(prompt, code, "prompt"), h("div", answers, class_="answers"),
             dir="rtl" if code in RIGHT_TO_LEFT else None)


def table(caption, head, rows):
    """The first cell of each row is its header. A cell (text, shade) is tinted by shade in [0, 1]."""
    def cell(c):
        return h("td", c[0], style=f"--shade:{50 * min(max(c[1], 0), 1):.0f}%") if isinstance(c, tuple) else h("td", c)
    rows = [h("tr", h("th", row[0], scope="row"), [cell(c) for c in row[1:]]) for row in rows]
    head = h("tr", [h("th", c, scope="col") for c in head])
    return h("div", h("table", h("caption", caption), h("thead", head), h("tbody", rows)), class_="scroll",
             tabindex=0, role="region", aria_label=caption)


# The policy forbids the page to load anything, whatever a completion may hold.
HEAD = Html("""<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root{color-scheme:light dark;--bg:#faf9f6;--card:#fff;--ink:#1c1e24;--muted:#5b616e;--rule:#dedad0;--grid:#e8e5dd;
--accent:#4b3bc4;--good:#12703c;--bad:#b3261e;--t0:#2b7bba;--t1:#c2447f;--t2:#b8730a;--t3:#3d8c40;--t4:#7d7f87}
@media(prefers-color-scheme:dark){:root{--bg:#14151a;--card:#1c1e25;--ink:#eceae4;--muted:#a3a8b4;--rule:#353842;
--grid:#2b2e37;--accent:#a598ff;--good:#5fce8f;--bad:#ff8f86;--t0:#66b2ec;--t1:#ee86b4;--t2:#e6ac4c;--t3:#7cc47f}}
*{box-sizing:border-box}h1,h2,h3,h4,p,figure,ul{margin:0}
body{margin:0 auto;max-width:68rem;padding:2.5rem 1.25rem 3rem;background:var(--bg);color:var(--ink);line-height:1.5;
font-family:system-ui,"Segoe UI","Noto Sans","Noto Sans Arabic","Noto Sans Hebrew","Noto Sans Devanagari",sans-serif}
:lang(ja){font-family:"Hiragino Sans","Yu Gothic","Noto Sans CJK JP",sans-serif}
:lang(ko){font-family:"Apple SD Gothic Neo","Malgun Gothic","Noto Sans CJK KR",sans-serif}
:lang(zh-Hans){font-family:"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
:lang(zh-Hant){font-family:"PingFang TC","Microsoft JhengHei","Noto Sans CJK TC",sans-serif}
h1,h2{font-family:"Iowan Old Style","Palatino Linotype",Palatino,"Noto Serif",Georgia,serif;line-height:1.1;
text-wrap:balance}h1{font-size:clamp(2.1rem,6vw,3.6rem)}h2{font-size:1.7rem;margin-bottom:.6rem}h3{font-size:1rem}
h4{font-size:.75rem;color:var(--muted);font-weight:500}.lead{max-width:46rem;margin-bottom:1.4rem}
header .lead{font-size:1.15rem;margin:.9rem 0 1.2rem}
section,footer{margin-top:2.5rem;border-top:1px solid var(--rule);padding-top:1.8rem}
small,figcaption p,.key,footer,caption,.eyebrow{color:var(--muted);font-size:.8rem}.good{color:var(--good)}
.bad{color:var(--bad)}
.toy{border-left:4px solid var(--accent);background:var(--card);padding:.7rem 1rem;margin-bottom:1.5rem;
max-width:46rem}
figure+figure{margin-top:2rem}figcaption,.key{margin-bottom:.5rem}
.tiles,.pair,.trio,.answers{display:grid;gap:1.2rem 2.2rem;grid-template-columns:repeat(3,1fr)}
.tiles b{display:block;font-size:1.75rem;line-height:1.2}.pair{grid-template-columns:5fr 3fr}
.pair>figure,.trio>figure{display:grid;grid-template-rows:subgrid;grid-row:span 2;gap:0;margin:0}
.columns{columns:2;column-gap:3rem}.group{break-inside:avoid;padding-bottom:1rem}
.row{display:grid;grid-template-columns:9.6rem minmax(0,1fr) 5.2rem;gap:.9rem;align-items:center;font-size:.9rem;
line-height:1.2}.trio .row{grid-template-columns:4.6rem minmax(0,1fr) 4.8rem}.row svg{width:100%;overflow:visible}
.pair figure+figure .row{grid-template-columns:minmax(0,1fr) 5.2rem}.pair figure+figure .label{display:none}
.label{overflow-wrap:anywhere}.label small{display:block;font-size:.74rem}.value{white-space:nowrap}
svg[height="44"]+.value small{display:block}.value,.tiles b,table{font-variant-numeric:tabular-nums}
.ruler .label{font-size:.8rem;font-weight:600}
i{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.4rem}
.key span{margin-right:1.1rem;white-space:nowrap}text{fill:var(--muted);font-size:11px;text-anchor:middle}
.trio text:nth-child(even){display:none}.grid{stroke:var(--grid)}.mark{stroke:var(--ink);stroke-dasharray:3 3}
.area{fill:var(--accent);opacity:.09}.trunk{stroke:var(--accent);stroke-width:3;stroke-linecap:round}
.branch{stroke-width:1.5;stroke-dasharray:2 3}.rise{stroke:var(--accent);stroke-width:3}
.fall{stroke:var(--bad);stroke-width:3}.interval{stroke-width:7;stroke-linecap:round;opacity:.45}
circle{stroke:var(--bg);stroke-width:2;fill:var(--accent)}.final{r:8px}
circle.before,circle.ring{fill:var(--bg);stroke:var(--muted)}circle.ring{stroke:var(--t2)}
rect[style]{fill:currentColor}.outline{stroke:currentColor;fill-opacity:.15}.better{stroke:var(--accent)}
.worse{stroke:var(--bad);fill:var(--bad)}.even{stroke:var(--muted);fill:var(--muted)}
circle.better,circle.worse,circle.even{stroke:var(--bg);r:3.5px}
i.before,i.after,i.ring{border-radius:50%;border:2px solid var(--muted)}
i.after{background:var(--accent);border-color:var(--accent)}i.ring{border-color:var(--t2)}
.claims{list-style:none;padding:0}
.claims li{display:grid;grid-template-columns:1.4rem 1fr auto;gap:.6rem;border-bottom:1px solid var(--grid);
padding:.45rem 0}details{border-top:1px solid var(--grid);padding:.6rem 0}summary{cursor:pointer}
article{background:var(--card);border:1px solid var(--grid);border-radius:8px;padding:.8rem 1rem;margin:.7rem 0}
.answers{gap:.8rem;margin-top:.5rem}article p{unicode-bidi:isolate;white-space:pre-wrap;overflow-wrap:anywhere}
.prompt{color:var(--muted)}.text{font-size:1.1rem}.scroll{overflow-x:auto;margin-top:1rem}
table{border-collapse:collapse;font-size:.85rem;width:100%}
th,td{padding:.35rem .45rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--grid)}th{font-weight:500}
th:first-child{text-align:left;position:sticky;left:0;background:var(--bg)}caption{text-align:left;padding:.4rem 0}
.heat thead th{white-space:normal;overflow-wrap:anywhere;min-width:4.4rem;vertical-align:bottom}
h3,bdi,footer{overflow-wrap:anywhere}.whisker{stroke:var(--muted);stroke-width:2}.drop{color:var(--bad);font-size:.8rem}
td[style]{background:color-mix(in srgb,var(--accent) var(--shade),transparent)}
@media(max-width:46rem){.tiles,.pair,.trio,.answers{grid-template-columns:1fr}.columns{columns:1}
.row,.columns .row,.trio .row,.pair figure+figure .row{grid-template-columns:6.6rem minmax(0,1fr) 5rem;gap:.6rem;
font-size:.85rem}.pair figure+figure .label{display:block}
tbody th:first-child{white-space:normal;overflow-wrap:anywhere;min-width:6.4rem}
.pair .label small,.pair .empty,text:nth-child(even){display:none}.claims li{grid-template-columns:1rem 1fr}
.claims li b+span+b{grid-column:2}}
</style>""")


def document(title, header, sections, footer):
    """The whole page as a string. Of the sections (title, lead or None, parts), those without parts are left out."""
    body = [h("section", h("h2", name), lead and h("p", lead, class_="lead"), parts) for name, lead, parts in sections
            if (any(parts) if isinstance(parts, list) else parts)]
    return "<!doctype html>\n" + h("html", h("head", HEAD, h("title", title)), h(
        "body", header, h("main", body), h("footer", footer)), lang="en")
