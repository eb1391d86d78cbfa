"""The web page of ``fairseq-interactive --serve`` in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from fairseq.models import TransformerModel
from tests.browser import Page, find_chromium, open_browser
from tests.test_serve import command, directory, process, slow_server  # noqa: F401  (directory is a fixture)

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
SHOWN = "document.querySelector('td[title]') && !document.querySelector('#results.waiting')"
BEST = "[...document.querySelectorAll('ol li:first-child .translation')].map((e) => e.textContent)"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM) as page:
        yield page


@pytest.fixture(scope="module")
def url(directory: Path) -> Iterator[str]:  # noqa: F811
    one, two = directory / "model1.pt", directory / "model2.pt"
    with process(*command(directory, "--model", f"One={one}", "--model", f"Two={two}", "--serve", "0")) as (port, _):
        yield f"http://127.0.0.1:{port}/"


def test_type_compare_and_look(page, url, directory):  # noqa: F811
    model, other = (TransformerModel.from_pretrained(directory, f"model{i}.pt", "bin") for i in (1, 2))
    page.open(url)
    page.wait_for("!document.getElementById('model-field').hidden")
    page.type("a b c")  # the text field has the focus
    page.wait_for(SHOWN)
    expected = model.generate("a b c", nbest=3, max_len_b=9, print_alignment=True)
    assert page.evaluate("[...document.querySelectorAll('.translation')].map((e) => e.textContent)") == [
        h.text for h in expected.hypotheses
    ]
    assert page.evaluate("[...document.querySelectorAll('thead th')].map((e) => e.textContent)") == [*"abc", "</s>"]
    for chosen in (0, 1):  # the second by the keyboard: an arrow in the list of hypotheses
        tokens = expected.hypotheses[chosen].tokens
        assert page.evaluate("[...document.querySelectorAll('tbody th')].map((e) => e.textContent)") == tokens
        weights = page.evaluate("[...document.querySelectorAll('tbody td')].map((e) => e.textContent)")
        attention = expected.hypotheses[chosen].attention
        assert attention is not None
        assert [float(w) for w in weights] == pytest.approx(attention.T.flatten().tolist(), abs=0.006)
        page.evaluate("document.querySelector('li input').focus()")
        page.press("ArrowDown", 40)
    page.evaluate("beside.value = 'Two'; beside.dispatchEvent(new Event('input', { bubbles: true }))")
    page.wait_for("document.querySelectorAll('.model').length === 2")
    assert page.evaluate(BEST) == [m.translate("a b c", max_len_b=9) for m in (model, other)]
    assert page.messages == []  # no script error, nothing that the content policy stopped


def test_markup_stays_text_at_any_width(page, url):
    attack = "<script>alert(1)</script> <img src=x onerror=alert(2)> \u202e שלום 犬 😀 " + "x" * 300
    page.open(url + "#" + urlencode({"text": attack + "\na b", "beside": "Two"}), width=360, height=740, dark=True)
    page.wait_for(SHOWN)
    assert page.evaluate("document.querySelector('.source').textContent") == attack
    assert page.evaluate("document.querySelectorAll('#results script, #results img').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((e) => !e.labels.length).length"
    assert page.evaluate(unnamed) == 0
    assert page.messages == []


def test_problems_are_told_and_stale_answers_dropped(page, directory):  # noqa: F811
    with slow_server(directory, 30) as (port, _):
        page.open(f"http://127.0.0.1:{port}/")
        page.wait_for("document.getElementById('languages').textContent")
        page.type("slow a")
        page.wait_for("document.querySelector('#results.waiting')")
        page.evaluate("text.select()")
        page.type("a b")
        page.wait_for(SHOWN)
        page.evaluate("new Promise((resolve) => setTimeout(resolve, 2500))")  # were 'slow a' shown, it would be by now
        assert page.evaluate("[...document.querySelectorAll('thead th')].map((e) => e.textContent)") == [*"ab", "</s>"]
        page.evaluate("text.value = 'broken'; text.dispatchEvent(new Event('input', { bubbles: true }))")
        page.wait_for("document.getElementById('problem').textContent.includes('something went wrong')")
    page.messages.clear()  # the browser's own about the status
    page.evaluate("text.value = 'c'; text.dispatchEvent(new Event('input', { bubbles: true }))")
    page.wait_for("document.getElementById('problem').textContent.includes('does not answer')")
    page.messages.clear()
