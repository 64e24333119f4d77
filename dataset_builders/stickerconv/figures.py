"""Figures 4, 5 and 6 of a dataset, as PNG and SVG, in colours that colour-blind readers can tell apart (Okabe and Ito)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from PIL import ImageFont
from wordcloud import WordCloud

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickerconv.emotion_words import EMOTION_OF


ROLE_COLOURS = {"user": "#E69F00", "system": "#0072B2"}
COLOURS = dict(
    zip(EMOTIONS, ("#D55E00", "#009E73", "#CC79A7", "#C28500", "#5F5F5F", "#0072B2", "#3A9BD1"), strict=True)
)
WIDTH, DPI = 8.0, 150  # inches; 1,200 px, so that text stays readable at a card's width
CLOUD_SIZE = (WIDTH, 4.2)
FONT = findfont("DejaVu Sans")
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "stickerconv",
}


def draw_figures(statistics: dict, folder: Path) -> list[str]:
    """
    Draw the figures that the statistics have something for.

    Args:
        statistics (`dict`): Of [`compute_statistics`].
        folder (`Path`): Where `<name>.png` and `<name>.svg` go; made if needed.

    Returns:
        `list[str]`: Names of what was drawn, of `sticker_emotions`, `profile_emotions` and `emotion_words`.

    """
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[dict], Figure]] = {
        "sticker_emotions": draw_sticker_emotions,
        "profile_emotions": draw_profile_emotions,
        "emotion_words": draw_emotion_words,
    }
    drawn = []
    with mpl.rc_context(STYLE):
        for name, draw in drawings.items():
            if _has_emotions(statistics[name]):
                figure = draw(statistics[name])
                figure.savefig(folder / f"{name}.png", dpi=DPI)
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                drawn.append(name)
    return drawn


def _has_emotions(counts: dict) -> bool:
    """Whether anything in (nested) counts is of a known emotion."""
    return any(
        _has_emotions(value) if isinstance(value, dict) else key in COLOURS or key in EMOTION_OF
        for key, value in counts.items()
    )


def draw_sticker_emotions(counts: dict[str, dict[str, int]]) -> Figure:
    """Figure 4: the emotions of the stickers that each side sends, in per cent of its own."""
    figure = Figure((WIDTH, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for side, (role, colour) in enumerate(ROLE_COLOURS.items()):
        shares = percentages(counts[role])
        left = [place + 0.4 * (side - 0.5) for place in range(len(EMOTIONS))]
        bars = axes.bar(
            left, shares, 0.38, color=colour, label=f"{role.title()} ({sum(counts[role].values()):,} stickers)"
        )
        axes.bar_label(bars, [f"{value:.0f}" for value in shares], padding=2, fontsize=9)
    axes.set_xticks(range(len(EMOTIONS)), EMOTIONS)
    _finish(axes, "Emotions of the stickers sent")
    axes.set_ylabel("% of the side's stickers")
    axes.legend(frameon=False)
    return figure


def draw_profile_emotions(counts: dict[str, int]) -> Figure:
    """Figure 5: the emotions of the Users' profiles, in per cent."""
    figure = Figure((WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot()
    shares = percentages(counts)
    bars = axes.barh(EMOTIONS, shares, 0.7, color=[COLOURS[emotion] for emotion in EMOTIONS])
    labels = [f"{value:.1f} %  ({counts.get(emotion, 0):,})" for emotion, value in zip(EMOTIONS, shares, strict=True)]
    axes.bar_label(bars, labels, padding=4, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max(shares))
    _finish(axes, "Emotions of the Users' profiles")
    axes.set_xlabel("% of the sessions")
    return figure


def draw_emotion_words(counts: dict[str, int]) -> Figure:
    """Figure 6: the most frequent words of feeling, larger the more frequent, coloured by the emotion they belong to."""
    figure = Figure((CLOUD_SIZE[0], CLOUD_SIZE[1] + 0.8))
    height = CLOUD_SIZE[1] / (CLOUD_SIZE[1] + 0.8)
    axes = figure.add_axes((0.0, 0.07, 1.0, height))
    width, rows = (round(inches * DPI) for inches in CLOUD_SIZE)
    axes.set(xlim=(0, width), ylim=(rows, 0))
    axes.axis("off")
    cloud = WordCloud(FONT, width, rows, margin=6, prefer_horizontal=0.85, random_state=0, max_font_size=130, relative_scaling=0.45)  # fmt: skip
    for (word, _), size, (row, column), turned, _ in cloud.generate_from_frequencies(counts).layout_:
        path = _word_path(word, size, bool(turned)).transformed(Affine2D().translate(column, row))
        axes.add_patch(PathPatch(path, color=COLOURS[EMOTION_OF[word]], linewidth=0))
    figure.suptitle(f"The {len(counts)} most frequent words of feeling", y=0.985)
    handles = [Patch(color=colour, label=emotion) for emotion, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=10, handlelength=1, columnspacing=1.2)  # fmt: skip
    return figure


def _word_path(word: str, size: int, turned: bool) -> Outline:
    """
    A word's outline, from (0, 0) to the lower right, where the layout thinks its ink is.

    The layout measured Pillow's letters, which stand on whole pixels, so the outline is stretched by the little that it differs.
    """
    path, picture = TextPath((0, 0), word, size), ImageFont.truetype(FONT, size).getmask(word)
    box, (left, top, right, bottom) = path.get_extents(), picture.getbbox()
    scale = (right - left) / box.width, -(bottom - top) / box.height
    fit = Affine2D().translate(-box.x0, -box.y1).scale(*scale).translate(left, top)
    return path.transformed(fit.rotate_deg(-90).translate(0, picture.size[0]) if turned else fit)


def percentages(counts: dict[str, int]) -> list[float]:
    """Per cent of each emotion, in order, of all that have one."""
    total = sum(counts.get(emotion, 0) for emotion in EMOTIONS)
    return [100 * counts.get(emotion, 0) / max(1, total) for emotion in EMOTIONS]


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left")
    axes.tick_params(length=0)
