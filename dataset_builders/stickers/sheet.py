"""Contact sheets."""

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    images: list[Image.Image], labels: list[str], columns: int = 8, side: int = 128, footer: str = ""
) -> Image.Image:
    """
    Lay pictures out in a grid on white.

    Args:
        images (`list[PIL.Image.Image]`): Pictures with or without alpha.
        labels (`list[str]`): A line under each.
        columns (`int`, *optional*, defaults to 8): Pictures a row.
        side (`int`, *optional*, defaults to 128): Side of a picture in pixels.
        footer (`str`, *optional*): A line at the bottom, e.g. the attribution.

    Returns:
        `PIL.Image.Image`: RGB.

    """
    font = ImageFont.load_default(13)
    cell, line = side + 12, 20
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + line) + (line + 6 if footer else 0)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = index % columns * cell + 6, index // columns * (cell + line) + 6
        picture = image.convert("RGBA").resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top), picture)
        draw.text((left + side / 2, top + side + 4), label[:20], fill="#444444", anchor="ma", font=font)
    if footer:
        draw.text((6, sheet.height - line), footer, fill="#666666", font=font)
    return sheet
