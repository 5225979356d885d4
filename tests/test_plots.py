"The house style: figures that can be read, alt texts, and no text of a user that becomes HTML."
import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import IPython.display
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from sftlab.figures.memory import plot_estimates
from sftlab.models import tiny_path
from sftlab.plots import (PALETTE, TEXT, Diagram, LossPlot, attention_grid, contrast, figure,
                          image_html, labels_html, log_axis, panels, plot_bars, plot_dataset,
                          plot_loss, plot_means, png, show, text_html, token_strip, tokens_html)

TINY = AutoTokenizer.from_pretrained(tiny_path())


class Tags(HTMLParser):
    "What a browser would make of it: tags with their attributes, and the texts inside of each."
    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "br"):
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append((data, self.open[-1][1].get("style", "") if self.open else ""))


@pytest.fixture
def shown(monkeypatch):
    "What is displayed: (display number, bundle)."
    seen = []
    class Handle:
        def __init__(self, number):
            self.number = number
        def update(self, bundle, raw):
            assert raw
            seen.append((self.number, bundle))
    def display(bundle, raw, display_id=None):
        assert raw
        seen.append((len(seen), bundle))
        return Handle(seen[-1][0]) if display_id else None
    monkeypatch.setattr(IPython.display, "display", display)
    return seen


# --- colours

def test_contrast_is_wcags():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert contrast("#ffffff", "#777777") == contrast("#777777", "#ffffff")


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_every_colour_can_be_seen_on_light_and_dark(page):
    assert set(PALETTE) == {"blue", "orange", "green", "purple", "red", "grey"}
    assert min(contrast(color, page) for color in PALETTE.values()) >= 3
    assert contrast(TEXT, page) >= 4.3  # 4.35 is the most that both pages allow
    assert contrast("#0000ff", "#111111") < 3  # a colour that would be refused


# --- a figure

def test_a_figure_is_one_image_at_its_real_width_with_a_transparent_ground(shown):
    fig, ax = figure(4, 2)
    ax.plot([1, 2])
    show(fig, "  A line rises.  ")
    (_, bundle), = shown
    assert set(bundle) == {"text/html", "text/plain"} and bundle["text/plain"] == "A line rises."
    (tag, attributes), = Tags(bundle["text/html"]).tags
    assert tag == "img" and attributes["alt"] == "A line rises." and attributes["width"] == "384"
    assert "max-width:100%" in attributes["style"] and "height:auto" in attributes["style"]
    kind, _, data = attributes["src"].partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and image.size == (576, 288)
    assert image.getpixel((2, 2))[3] == 0


@pytest.mark.parametrize("alt", ["", "  \n", None, 3])
def test_no_figure_without_alt_text(shown, alt):
    fig, _ = figure()
    for draw in (show, image_html):
        with pytest.raises(ValueError, match="needs an alt text"):
            draw(fig, alt)
    with pytest.raises(ValueError, match="needs an alt text"):
        Diagram().show(alt)
    assert not shown


ALMOST_NOTHING = Diagram(0.1, 0.1).fig
anything = st.text(alphabet=st.sampled_from("ab <>&\"'\n秘🙂é/;#"), max_size=30)


@given(anything.filter(str.strip))
def test_any_alt_text_stays_a_text(alt):
    html = image_html(ALMOST_NOTHING, alt)
    (tag, attributes), = Tags(html).tags
    assert tag == "img" and html.count("<") == html.count(">") == 1
    assert attributes["alt"] == alt.strip() and set(attributes) == {"alt", "src", "style", "width"}


def test_labels_of_less_than_nine_points_are_refused(shown):
    fig, ax = figure()
    label = ax.text(0, 0, "small", fontsize=8)
    with pytest.raises(ValueError, match="'small' would be shown with 8.0 pt"):
        show(fig, "a figure")
    label.set_visible(False)
    show(fig, "a figure")
    wide, ax = figure(width=10)
    ax.set_title("fine elsewhere")
    with pytest.raises(ValueError, match="no wider than 7 inches"):
        show(wide, "too wide for the page")
    assert len(shown) == 1


def test_pyplots_figures_are_closed(shown):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.close("all")
    fig, ax = plt.subplots()
    show(fig, "nothing")
    assert not plt.get_fignums()


def test_text_and_lines_have_the_house_style():
    fig, ax = figure()
    for _ in PALETTE:
        ax.plot([1, 2], label="a line")
    assert [line.get_color() for line in ax.lines] == list(PALETTE.values())
    assert len({str(line._unscaled_dash_pattern) for line in ax.lines}) == len(PALETTE)
    texts = [ax.set_title("title"), ax.xaxis.label, *ax.get_xticklabels(), *ax.legend().get_texts()]
    assert {text.get_color() for text in texts} == {TEXT}
    assert min(text.get_fontsize() for text in texts) >= 9


def test_a_log_axis_has_plain_numbers():
    fig, ax = figure()
    ax.plot([1, 2], [0.0003, 40])
    log_axis(ax, steps=(1,))
    png(fig)
    ticks = [label.get_text() for label in ax.get_yticklabels()]
    assert {"0.001", "0.1", "10"} <= set(ticks) and ax.get_xscale() == "linear"


# --- plots

HISTORY = [dict(step=0, epoch=0.0, eval_nll=4.0)]
HISTORY += [dict(step=i, epoch=i / 4, loss=3.0 / i) for i in range(1, 9)]
HISTORY[4]["eval_nll"] = 1.0


@pytest.mark.parametrize("history", [HISTORY, pd.DataFrame(HISTORY)])
def test_loss_and_held_out_loss_are_drawn(history):
    fig, ax = figure()
    plot_loss(ax, history)
    loss, held_out = ax.lines
    assert list(loss.get_xdata()) == list(range(1, 9)) and list(held_out.get_xdata()) == [0, 4]
    assert loss.get_linestyle() != held_out.get_linestyle() and "nats" in ax.get_ylabel()
    fig, ax = figure()
    plot_loss(ax, [dict(epoch=1.0, loss=2.0), dict(epoch=2.0, held_out_nll=1.5)], x="epoch")
    assert [len(line.get_xdata()) for line in ax.lines] == [1, 1]


def test_the_loss_plot_updates_one_display(shown):
    plot = LossPlot(every=0)
    for n in range(2, 10):
        plot(HISTORY[:n], 8)
    assert len(shown) == 8 and {number for number, _ in shown} == {0}
    alts = [Tags(bundle["text/html"]).tags[0][1]["alt"] for _, bundle in shown]
    assert alts[0] == "Loss of the training up to step 1 of 8." and "step 8 of 8" in alts[-1]
    shown.clear()
    rare = LossPlot(every=1000)
    for n in range(2, 10):
        rare(HISTORY[:n], 8)
    assert len(shown) == 2  # the first step and the last


def test_means_have_students_interval_over_seeds():
    table = pd.DataFrame(dict(r=[2, 2, 2, 1, 1, 1], exact=[1.0, 2.0, 3.0, 5.0, 5.0, 5.0]))
    fig, ax = figure()
    plot_means(ax, table, "r", "exact", label="all", marker="s", linestyle="none")
    line, _, (bars,) = ax.containers[0]
    assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == [5, 2]
    half = 4.3027 / 3**0.5  # Student's t, two degrees of freedom
    assert bars.get_segments()[1][:, 1].tolist() == pytest.approx([2 - half, 2 + half], abs=1e-3)
    fig, ax = figure()
    plot_means(ax, pd.DataFrame(dict(way=["b", "a", "b"], y=[1.0, 3.0, 2.0])), "way", "y")
    assert list(ax.containers[0][0].get_xdata()) == ["b", "a"]  # names keep their order
    assert list(ax.containers[0][0].get_ydata()) == [1.5, 3]  # one run: no interval


@pytest.mark.parametrize("horizontal", [False, True])
def test_bars_differ_in_more_than_colour(horizontal):
    fig, ax = figure()
    plot_bars(ax, dict(a=dict(x=1, y=2), b=dict(y=4)), "%", horizontal=horizontal)
    x, y = ax.containers
    size = (lambda bar: bar.get_width()) if horizontal else (lambda bar: bar.get_height())
    assert [size(bar) for bar in x] == [1] and [size(bar) for bar in y] == [2, 4]
    assert x[0].get_hatch() != y[0].get_hatch() and x[0].get_facecolor() != y[0].get_facecolor()
    assert [text.get_text() for text in ax.texts] == ["1", "2", "4"]
    assert (ax.get_xlabel() if horizontal else ax.get_ylabel()) == "%"
    fig, ax = figure()
    plot_bars(ax, dict(a=3, b=5), intervals=dict(a=(2, 4), b=(4.5, 6)), horizontal=horizontal)
    axis = 0 if horizontal else 1
    ends = [segment[:, axis].tolist() for segment in ax.containers[1][2][0].get_segments()]
    assert ends == [[2, 4], [4.5, 6]] and not ax.texts
    image_html(fig, "bars")


def test_a_data_set_at_a_glance():
    scripts = ["Latin", "Han + Latin", "Latin"]
    sizes = dict(turns=[2, 2, 4], length=[10, 20, 30], answers=[5, 5, 10])
    table = pd.DataFrame(sizes | dict(scripts=scripts))
    fig = plot_dataset(table, "tokens", groups=[0, 0, 1])
    _, turns, scripts, same = fig.axes
    assert [bar.get_height() for bar in turns.patches] == [2, 1]
    assert [bar.get_height() for bar in scripts.patches] == [2, 1]
    assert [bar.get_height() for bar in same.patches] == [1, 1]  # one alone, one pair
    first, second = fig.get_suptitle().split("\n")
    assert first == "3 conversations; 33% of their tokens are answers;"
    assert second == "1 nearly repeat another"
    image_html(fig, "a data set")
    without = plot_dataset(table)
    assert "characters" in without.get_suptitle() and "repeat" not in without.get_suptitle()
    assert not without.axes[3].patches
    image_html(plot_dataset(table[:0]), "no data")


def test_memory_is_stacked_and_compared_with_a_card():
    def run(*sizes): return SimpleNamespace(terms=dict(zip(("weights", "none", "logits"), sizes)))
    two = {"a": run(4e9, 0, 2e9), "b": run(1e9, 0, 1e9)}
    fig = plot_estimates(two, card_gb=8)
    bars = fig.axes[0].patches
    assert [bar.get_width() for bar in bars] == [4, 1, 2, 1]
    assert [bar.get_x() for bar in bars] == [0, 0, 4, 1]
    assert bars[0].get_hatch() != bars[2].get_hatch()
    legend = [text.get_text() for text in fig.legends[0].get_texts()]
    assert legend == ["a card of 8 GB", "weights", "logits"]
    assert fig.axes[0].lines[0].get_xdata()[0] == 8 * 2**30 / 1e9
    assert [name.get_text() for name in fig.axes[0].get_yticklabels()] == ["a", "b"]
    image_html(fig, "two estimates")


def test_a_diagram_is_to_scale_and_arrows_join_what_faces():
    d = Diagram(6, 3)
    wide, high = d.matrix(1, 1, 10, 100, "A"), d.matrix(4, 0.5, 100, 10, "W", "red", frozen=True)
    assert wide == (1, 1, 1.0, 0.1) and high == (4, 0.5, 0.1, 1.0)
    assert {"10 × 100", "100 × 10", "A", "W"} <= {text.get_text() for text in d.ax.texts}
    assert [p.get_hatch() for p in d.ax.patches if p.get_hatch()] == ["//"]
    box = d.box(1, 2, 1, 0.5, "x")
    def ends(a, b):
        d.arrow(a, b, "text")
        arrow = next(text for text in reversed(d.ax.texts) if getattr(text, "arrow_patch", None))
        return [tuple(round(float(n), 6) for n in point) for point in (arrow.xyann, arrow.xy)]
    assert ends(wide, high) == [(2, 1.05), (4, 1.05)] and ends(high, wide) == [(4, 1.05), (2, 1.05)]
    assert ends(wide, box) == [(1.5, 1.1), (1.5, 2)] and ends(box, wide) == [(1.5, 2), (1.5, 1.1)]
    assert ends(box, (5, 2.75)) == [(2, 2.25), (5, 2.75)]
    with pytest.raises(KeyError):
        d.box(0, 0, 1, 1, color="pink")
    image_html(d.fig, "a diagram")


def test_who_attends_to_whom():
    fig = attention_grid([[1, 0], [1, 1]], ["a", "b"])
    ax = fig.axes[0]
    assert len(ax.patches) == 4
    dots = {(int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in ax.lines}
    assert dots == {(0, 0), (0, 1), (1, 1)}  # column, row
    filled = [patch.get_facecolor()[3] for patch in ax.patches]
    assert filled == [1, 0, 1, 1]
    image_html(fig, "a grid")


# --- text and tokens

SPECIAL = "<|im_end|>"


@given(st.lists(st.tuples(anything, st.sampled_from(["plain", "learned", "special", "fault"]))))
def test_a_token_strip_shows_the_text_and_nothing_else(pieces):
    page = Tags(token_strip(pieces))
    assert {tag for tag, _ in page.tags} <= {"pre", "span"}
    wanted = "".join("✗" * (kind == "fault") + text for text, kind in pieces)
    assert "".join(text for text, _ in page.texts) == wanted


def test_each_kind_of_token_has_a_sign_besides_its_colour():
    styles = {}
    for kind in ("plain", "learned", "special", "fault"):
        styles[kind] = Tags(token_strip([("x", kind)])).texts[-1][1]
    assert "underline" in styles["learned"] and "2px solid" in styles["special"]
    assert "dashed" in styles["fault"] and len(set(styles.values())) == 4
    assert not any("color:#" in style for style in styles.values())
    with pytest.raises(KeyError):
        token_strip([("x", "unknown")])
    hint = Tags(token_strip([("x", "plain", 'a "hint" <b>')])).tags[-1][1]["title"]
    assert hint == 'a "hint" <b>'


@given(anything, st.data())
def test_labels_shown_are_whole(text, data):
    ids = TINY(text + SPECIAL)["input_ids"]
    labels = [data.draw(st.sampled_from([-100, id])) for id in ids]
    page = Tags(labels_html(ids, labels, TINY))
    runs = [(shown, "underline" in style) for shown, style in page.texts]
    if "\N{REPLACEMENT CHARACTER}" not in "".join(shown for shown, _ in runs):
        assert "".join(shown for shown, _ in runs) == TINY.decode(ids)
    learned = [label != -100 for label in labels]
    changes = [flag for flag, before in zip(learned, [None, *learned]) if flag != before]
    assert [flag for _, flag in runs] == changes


def test_a_wrong_label_has_a_cross():
    ids = TINY("one two three")["input_ids"]
    html = labels_html(ids, [-100] * len(ids), TINY, faults=[1])
    assert html.count("✗") == html.count("fault: 1 tokens") == 1
    assert sum(map(int, re.findall(r"masked: (\d+) tokens", html))) == len(ids) - 1


def test_tokens_in_boxes_say_where_they_come_from():
    text = "<b> & 🙂\n" + SPECIAL
    ids = TINY(text)["input_ids"]
    learned = [False] * 2 + [True] * (len(ids) - 2)
    sources = ["typed"] * (len(ids) - 1) + ["template"]
    page = Tags(tokens_html(TINY, ids, learned, sources, "a <title>"))
    boxes = [(shown, style) for shown, style in page.texts if "inline-block" in style]
    assert "".join(shown for shown, _ in boxes).replace("⏎", "\n").replace("·", " ") == text
    assert [shown for shown, style in boxes if "2px solid" in style] == [SPECIAL]
    heads = [shown for shown, style in page.texts if "flex:0 0" in style]
    assert heads == ["typed", "typed, learned", "template, learned"]
    assert page.texts[0][0] == "a <title>"
    assert page.texts[-1][0].startswith(f"{len(ids)} tokens, {len(ids) - 2} of them learned")
    bare = tokens_html(TINY, ids)
    assert "border-radius:6px" not in bare and "0 of them learned" in bare


def test_parts_of_a_character_share_a_box():
    ids = TINY("🦒")["input_ids"]
    html = tokens_html(TINY, ids)
    assert len(ids) > 1 and html.count("inline-block") == 1 and f"<sub>{len(ids)}</sub>" in html


@given(anything, anything, anything)
def test_panels_escape_what_is_typed(title, text, note):
    page = Tags(panels([(title, text_html(text, note)), ("second", "<i>HTML</i>")]))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("i") == 1 and set(tags) <= {"div", "pre", "i"}
    everything = "".join(shown for shown, _ in page.texts)
    assert everything == title + text + note + "second" + "HTML"
    assert panels({"a": "b"}) == panels([("a", "b")])


# --- cost

def test_importing_brings_nothing_heavy():
    code = ("import sys, sftlab, sftlab.plots; "
            "print({'matplotlib', 'numpy', 'torch', 'pandas', 'IPython'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_drawing_needs_no_torch_and_no_window():
    code = ("import sys; from sftlab.plots import figure, png; png(figure()[0]); "
            "print({'torch', 'matplotlib.pyplot'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
