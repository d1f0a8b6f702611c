"""Contact sheets: pictures in labelled rows and columns, for people to look at."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 6
FONT_SIZE = 13


def picture_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    scale: int = 2,
) -> Image.Image:
    """One picture of all pictures, each magnified `scale` times, with a label before each row and above each column."""
    font = ImageFont.load_default(FONT_SIZE)
    width = max(picture.width for row in rows for picture in row) * scale
    heights = [max(picture.height for picture in row) * scale for row in rows]
    left = max(int(font.getlength(label)) for label in row_labels) + 2 * MARGIN
    wrapped = [textwrap.fill(label, max(int(width / (0.55 * FONT_SIZE)), 4)) for label in column_labels]
    line = FONT_SIZE + 3
    top = max((text.count("\n") + 1 for text in wrapped), default=0) * line + MARGIN
    columns = max(map(len, rows))
    sheet = Image.new(
        "RGB", (left + columns * (width + MARGIN), top + sum(heights) + MARGIN * (len(rows) + 1)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(wrapped):
        draw.multiline_text(
            (left + column * (width + MARGIN), MARGIN // 2), text, fill="black", font=font, spacing=3
        )
    y = top
    for row, label, height in zip(rows, row_labels, heights, strict=True):
        draw.text((MARGIN, y + height // 2 - line // 2), label, fill="black", font=font)
        for column, picture in enumerate(row):
            large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            sheet.paste(large, (left + column * (width + MARGIN), y))
        y += height + MARGIN
    return sheet
