"""Class names in any script: fonts that have their characters are used, and a missing font is named once."""

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from t2t_vit import plots

DOG = '犬'


@pytest.fixture
def unseen(monkeypatch):
    """Forget which fonts were looked up, and hide the installed ones that have the character."""
    for function in (plots.characters, plots.fonts_for, plots.warn_missing):
        function.cache_clear()
    fonts = font_manager.fontManager
    kept = [font for font in fonts.ttflist if ord(DOG) not in plots.characters(font.fname)]
    monkeypatch.setattr(fonts, 'ttflist', kept)
    yield
    plots.fonts_for.cache_clear()


def draw(path):
    figure = Figure(figsize=(1, 1))
    figure.text(0.2, 0.4, f'a {DOG}', fontsize=30)
    return Image.open(plots.save_figure(figure, path)).convert('L')


def test_missing_font_is_named_once(unseen, tmp_path, capsys):
    draw(tmp_path / 'a.png')
    said = capsys.readouterr().err
    assert f'no installed font has {DOG}' in said and 'Install Noto Sans CJK' in said
    draw(tmp_path / 'b.png')
    assert capsys.readouterr().err == ''


def test_font_with_the_character_is_used(unseen, tmp_path, capsys):
    box = draw(tmp_path / 'box.png')
    pen = TTGlyphPen(None)
    for point in ((0, 0), (0, 700), (700, 0)):
        (pen.lineTo if pen.points else pen.moveTo)(point)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(['.notdef', 'dog'])
    builder.setupCharacterMap({ord(DOG): 'dog'})
    builder.setupGlyf({'.notdef': TTGlyphPen(None).glyph(), 'dog': pen.glyph()})
    builder.setupHorizontalMetrics({'.notdef': (500, 0), 'dog': (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({'familyName': 'Dogs', 'styleName': 'Regular'})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200, usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / 'dogs.ttf')
    font_manager.fontManager.addfont(tmp_path / 'dogs.ttf')
    plots.fonts_for.cache_clear()
    capsys.readouterr()
    drawn = draw(tmp_path / 'drawn.png')
    assert capsys.readouterr().err == '' and drawn.tobytes() != box.tobytes()
    left, right = (
        sum(value < 128 for value in drawn.crop(part).tobytes()) for part in ((0, 0, 60, 150), (60, 0, 150, 150))
    )
    assert right > 2 * left > 0  # a filled triangle beside an ordinary letter
