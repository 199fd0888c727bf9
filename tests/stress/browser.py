"""Drive the page in a browser, Debian's Chromium or Playwright's own: `make test-browser`.

Writes the screenshots of docs/explore.md to docs/pictures. Skipped without a browser.
"""

import io
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from t2t_vit.models.shipped import compared

playwright = pytest.importorskip('playwright.sync_api', reason='needs Playwright: pip install playwright')
pytest.importorskip('gradio', reason="needs Gradio: pip install 't2t-vit[explore]'")

RESNET, VIT, T2T = compared()
PICTURES = Path(__file__).resolve().parents[2] / 'docs' / 'pictures'
pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page with the models of the package."""
    folder = tmp_path_factory.mktemp('page')
    words = [sys.executable, '-u', '-m', 't2t_vit.cli', 'explore', '--runs', str(folder), '--max_megabytes', '2']
    with open(folder / 'log', 'w') as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        for _ in range(900):
            if (found := re.search(r'http://\S+', (folder / 'log').read_text())) or process.poll() is not None:
                break
            time.sleep(1)
        assert found, (folder / 'log').read_text()
        yield found[0]
        process.terminate()


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as player:
        own = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
        try:
            chromium = player.chromium.launch(executable_path=own, args=['--no-sandbox'])
        except playwright.Error as error:
            pytest.skip(f'no browser: apt-get install chromium, or playwright install chromium ({error})'[:300])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """Load the page; requests to other machines, errors on its console and failed requests fail the test."""
    page = browser.new_page(viewport=dict(width=1200, height=1000))
    wrong = []
    page.on(
        'request',
        lambda request: wrong.append(request.url) if not request.url.startswith((address, 'data:', 'blob:')) else None,
    )
    page.on('response', lambda answer: wrong.append(answer.url) if answer.status >= 400 else None)
    page.on('console', lambda message: wrong.append(message.text) if message.type == 'error' else None)
    open_page(page, address)
    page.expected = []  # type: ignore[attr-defined]  # refused requests that a test means to make
    yield page
    page.close()
    assert all(any(text in line for text in page.expected) for line in wrong), wrong


def open_page(page: Any, address: str) -> None:
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_selector('#picture .bars')


def choose_view(page: Any, name: str) -> None:
    page.locator('#view').get_by_label(name, exact=True).check()
    page.wait_for_selector(f'#picture .what[data-view="{name}"]')
    page.wait_for_timeout(300)
    mark = page.locator('#view input:checked').bounding_box()
    with Image.open(io.BytesIO(page.screenshot(clip=mark))) as image:
        pixels = np.asarray(image.convert('RGB')).astype(int)
    assert (pixels.max(-1) - pixels.min(-1) > 100).mean() > 0.3, 'the mark of the chosen view is invisible'


def caption(page: Any) -> str:
    return page.locator('#picture figcaption').first.inner_text()


def changed(page: Any, before: str) -> str:
    """Wait until the first caption has changed, and return it."""
    page.wait_for_function(
        'text => { const now = document.querySelector("#picture figcaption"); return now && now.innerText !== text }',
        arg=before,
    )
    return caption(page)


def pick(page: Any, where: str, name: str) -> None:
    page.locator(f'#{where} input').click()
    page.locator(f'#{where}').get_by_role('option', name=name, exact=True).click()  # the other list may be closing


def picture(page: Any, name: str, **how: Any) -> None:
    """Take a screenshot for the docs."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(700)
    page.screenshot(path=PICTURES / name, **how)
    with Image.open(PICTURES / name) as image:
        small = image.convert('RGB').quantize(256, kmeans=8)
        small.save(PICTURES / name, optimize=True)


def test_upload(page, tmp_path):
    Image.fromarray(load_sample_images().images[0]).save(tmp_path / 'mine.jpg')
    page.locator('#drop input[type=file]').set_input_files(tmp_path / 'mine.jpg')
    page.wait_for_function('document.querySelector("#preview").innerText.includes("mine.jpg")')
    assert page.locator('#picture .bars li').count() == 5
    page.locator('#drop input[type=file]').set_input_files(tmp_path / 'mine.jpg')  # once more
    assert page.locator('#wrong .wrong').count() == 0


def photo_by(page: Any, model: str) -> None:
    """Choose the photo of a pavilion and a model of photos."""
    page.locator('#examples button').nth(0).click()
    pick(page, 'first', model)
    page.wait_for_function('document.querySelector("#preview").innerText.match(/china.*64×64/)')


def test_sliders(page):
    photo_by(page, T2T)
    choose_view(page, 'Attention')
    before = caption(page)
    assert 'mean of' in before
    page.locator('#head input[type=range]').fill('2')
    assert 'head 2 of' in (now := changed(page, before))
    page.locator('#layer input[type=range]').fill('3')
    assert 'Layer 3 of' in changed(page, now)
    choose_view(page, 'Windows')
    near = page.locator('#picture figcaption').nth(1)
    before = near.inner_text()
    box = page.locator('#preview svg').bounding_box()  # a click moves the cross
    page.mouse.click(box['x'] + 0.27 * box['width'], box['y'] + 0.15 * box['height'])
    second = 'document.querySelectorAll("#picture figcaption")[1].innerText'
    page.wait_for_function(f'text => {second} !== text && {second}.match(/row \\d+, column \\d+:/)', arg=before)
    row, column = map(int, re.findall(r'row (\d+), column (\d+):', near.inner_text())[0])
    assert 1.3 < column / row < 2.6, near.inner_text()
    assert 'its pixels' in near.inner_text()
    picture(page, 'explore-windows.png', full_page=True)
    page.locator('#moving input').check()
    page.wait_for_selector('#picture animate[attributeName=viewBox]', state='attached')
    for view in ('Tokens', 'Evidence', 'Feature maps'):
        choose_view(page, view)
        assert page.locator('#wrong .wrong').count() == 0


def test_empty_slider_is_explained(page):
    box = page.locator('#top_k input[type=number]')
    box.fill('')
    page.locator('#wrong [role=alert]').filter(has_text='A number is missing: Classes.').wait_for()
    box.fill('3')
    page.wait_for_function('document.querySelectorAll("#picture .bars li").length == 3')
    assert page.locator('#wrong .wrong').count() == 0


def test_compare_models(page):
    own = page.locator('#first input').input_value()
    photo_by(page, T2T)
    pick(page, 'second', VIT)
    page.wait_for_selector('#picture section:nth-of-type(2)')
    choose_view(page, 'Feature maps')
    page.locator('#stage input[type=range]').fill('1')
    page.wait_for_function('document.querySelector("#picture").innerText.match(/attention1.*of 32/)')
    picture(page, 'explore-features.png')
    pick(page, 'second', RESNET)
    page.locator('#picture section').filter(has_text=RESNET).wait_for()
    pick(page, 'first', own)
    pick(page, 'second', f'{own}, untrained')
    page.locator('#examples button').nth(1).click()
    page.wait_for_function('document.querySelector("#preview").innerText.includes("flower")')
    page.locator('#examples button').nth(0).click()
    page.wait_for_function('document.querySelector("#preview").innerText.includes("china")')
    page.locator('#picture section[aria-label$=", untrained"]').wait_for()
    assert page.locator('#picture section').count() == 2
    choose_view(page, 'Tokens')
    page.wait_for_selector('#picture section:nth-of-type(2) svg')
    picture(page, 'explore-compare.png')
    assert '% on imagenette' in page.locator('#picture .card').first.inner_text()
    choose_view(page, 'Attention')
    assert page.locator('#picture .scale').first.is_visible()
    picture(page, 'explore-attention.png', full_page=True)


def test_report(page, tmp_path):
    page.locator('#make').click()
    button = page.locator('#download')
    button.wait_for(state='visible', timeout=120_000)
    with page.expect_download() as download:
        button.click()
    download.value.save_as(tmp_path / 'report.html')
    assert download.value.suggested_filename == 't2t-vit-report.html'
    assert 'data:image/png' in (tmp_path / 'report.html').read_text()


@pytest.mark.parametrize(
    'name, content, says', [('letter.png', b'Dear Sir or Madam', 'not an image'), ('torn.jpg', b'', 'damaged')]
)
def test_wrong_file_is_explained(page, tmp_path, name, content, says):
    if not content:
        Image.fromarray(load_sample_images().images[0]).save(tmp_path / 'whole.jpg')
        content = (tmp_path / 'whole.jpg').read_bytes()[:20_000]
    (tmp_path / name).write_bytes(content)
    page.locator('#drop input[type=file]').set_input_files(tmp_path / name)
    line = page.locator('#wrong [role=alert]')
    line.wait_for()
    assert says in line.inner_text() and name in line.inner_text()
    page.locator('#examples button').nth(1).click()  # the page works on, and the error disappears
    line.wait_for(state='detached')


def test_large_file_is_explained(page, tmp_path):
    page.expected += ['upload', '413']
    (tmp_path / 'large.png').write_bytes(bytes(3_000_000))
    page.locator('#drop input[type=file]').set_input_files(tmp_path / 'large.png')
    page.locator('#wrong [role=alert]').filter(has_text='The limit is 2 MB.').wait_for()


def test_drop_and_paste(page):
    """By the events that a browser sends."""
    script = """([kind, name]) => {
      const canvas = document.createElement('canvas');
      canvas.toBlob(blob => {
        const data = new DataTransfer();
        data.items.add(new File([blob], name, {type: 'image/png'}));
        if (kind === 'paste') document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        else document.querySelector('#drop label').dispatchEvent(new DragEvent('drop', {dataTransfer: data}));
      });
    }"""
    for kind in ('drop', 'paste'):
        page.evaluate(script, [kind, f'{kind}ed.png'])
        page.wait_for_function(f'document.querySelector("#preview").innerText.includes("{kind}ed.png")')


def test_narrow_screen(browser, address):
    page = browser.new_page(viewport=dict(width=375, height=800), device_scale_factor=1, has_touch=True)
    open_page(page, address)
    pick(page, 'second', page.locator('#first input').input_value() + ', untrained')
    page.wait_for_selector('#picture section:nth-of-type(2)')
    for view in ('Windows', 'Attention', 'Feature maps', 'Evidence'):
        choose_view(page, view)
        assert page.evaluate('document.documentElement.scrollWidth') <= 375, view
    edges = '({at: (name, edge) => document.querySelector(name).getBoundingClientRect()[edge]})'
    assert 0 < page.evaluate(f'{edges}.at("#picture", "top") - {edges}.at("#view", "bottom")') < 60
    picture(page, 'explore-phone.png', full_page=True)
    page.close()


def test_keyboard(page):
    """Use everything by Tab, arrows, Space and Enter."""
    reached = []
    for _ in range(60):
        page.keyboard.press('Tab')
        reached.append(
            page.evaluate("""() => { let at = document.activeElement;
            while (at && !at.id.match(/^[a-z_]+$/)) at = at.parentElement; return at ? at.id : "" }""")
        )
        style = page.evaluate(
            '(({outlineStyle, outlineWidth}) => [outlineStyle, outlineWidth])(getComputedStyle(document.activeElement))'
        )
        if reached[-1]:
            assert style == ['solid', '3px'], (reached[-1], style)  # the focus is visible
        if reached[-1] == 'make':
            break
    order = [
        reached.index(name)
        for name in ('drop', 'examples', 'across', 'down', 'first', 'second', 'view', 'top_k', 'make')
    ]
    assert order == sorted(order), reached  # as on the page
    page.locator('#view input').nth(0).focus()
    page.keyboard.press('Tab')  # Tab moves between Gradio's radio buttons, Space chooses
    page.keyboard.press('Space')
    page.wait_for_selector('#picture .what[data-view="Windows"]')
    before = page.locator('#picture figcaption').nth(1).inner_text()
    page.locator('#across input[type=range]').focus()
    for _ in range(30):
        page.keyboard.press('ArrowRight')
    page.wait_for_function('text => document.querySelectorAll("#picture figcaption")[1].innerText !== text', arg=before)
    page.locator('#examples button').nth(1).focus()
    page.keyboard.press('Enter')
    page.wait_for_function('document.querySelector("#preview").innerText.includes("flower")')
