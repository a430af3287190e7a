"""The live page in Chromium: typing, samples, comparison and coin, without a message, an error or a foreign request.

SERVE_PICTURES is a folder for pictures of the page.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import browser_support
import pytest
from browser_support import MILLISECONDS, until
from lm_support import untrained_checkpoint
from serve_support import ITEMS, TEXT, save, serving

from charlm.lm import checkpoint
from charlm.serve.coin import coin

pytestmark = pytest.mark.browser
PICTURES = os.environ.get("SERVE_PICTURES")
HOSTILE = "<img src=x onerror=alert(1)>"
browser = browser_support.browser


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page about two models, of names and of text, in a folder whose name is HTML."""
    seen = []
    runs = [save(tmp_path / HOSTILE / "names"), save(tmp_path / "text", TEXT, "gpt", n_embd=8, n_head=2)]
    with serving(*runs) as served:
        url = f"http://127.0.0.1:{served.port}/token/"

        def opened(width=1280, theme="light"):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
            page.set_default_timeout(MILLISECONDS)
            page.on("console", lambda message: seen.append(message.text))
            page.on("pageerror", lambda error: seen.append(str(error)))
            page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
            page.on("request", lambda request: request.url.startswith((url, "data:,")) or seen.append(request.url))
            page.served, page.runs = served, runs
            page.goto(url)
            page.wait_for_selector("html[data-ready]")
            return page

        yield opened
        for context in browser.contexts:
            context.close()
    assert seen == []


def cells(page, index=0, selector="#cells-"):
    return page.locator(f"{selector}{index} .cell").all_inner_texts()


def settled(page, text, index=0):
    """Waits for the bits of `text`, and returns them."""
    until(lambda: len(cells(page, index)) == len(text) and page.locator(f"#next-{index} tr").count() == 12)
    return [each.split("\n") for each in cells(page, index)]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_typing_shows_bits_the_next_character_and_the_comparison(show, width, theme):
    page = show(width, theme)
    assert HOSTILE in page.locator("#models li").first.inner_text()
    page.locator("#text").click()
    typed = ""
    for key in "emm":
        page.keyboard.press(key)
        typed += key
        for index, served in enumerate(page.served.models):
            expected = served.score(typed, 0)
            found = settled(page, typed, index)
            assert found == [
                [name, f"{bits:.1f}"] for name, bits in zip(expected["names"], expected["bits"], strict=True)
            ]
            rows = page.locator(f"#next-{index} tr").all_inner_texts()
            assert [row.split()[0] for row in rows] == [name for name, _ in expected["next"]["top"]]
            assert [float(row.split()[1]) for row in rows] == [
                pytest.approx(100 * p, abs=0.051) for _, p in expected["next"]["top"]
            ]
    for index, row in enumerate(page.locator("#compared tbody tr").all_inner_texts()):
        assert float(row.split("\t")[1]) == pytest.approx(
            sum(page.served.models[index].score(typed, 0)["bits"]), abs=0.01
        )
    page.keyboard.press("ArrowLeft")
    page.keyboard.type(f"{HOSTILE}\n")
    text = f"em{HOSTILE}\nm"
    assert "".join(name for name, _ in settled(page, text)) == text.replace(" ", "␣").replace("\n", "↵")
    assert len(page.locator("#difference .cell").all_inner_texts()) == len(text)
    assert page.locator(".cell.unknown").count() > 0
    until(lambda: "most probable next character" in page.locator("#summary").inner_text())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    browser_support.check_contrast(page, "body", ".faint", ".cell", "button", "th", "dd", ".first", ".second")
    if PICTURES:
        page.screenshot(path=Path(PICTURES, f"serve-{width}-{theme}.png"), full_page=True)


def test_a_text_of_100_mb_is_refused_with_a_sentence(show):
    page = show()
    prevented = page.evaluate("""() => {
        const data = new DataTransfer();
        data.setData("text", "a".repeat(1e8));
        const paste = new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
        return !document.getElementById("text").dispatchEvent(paste);
    }""")
    assert prevented
    assert (
        page.locator("#error").inner_text().startswith("The text has 100,000,000 characters, and this page takes 5,000")
    )
    page.locator("#text").fill("e" * 600)  # in three pieces
    settled(page, "e" * 600)
    assert page.locator("#error").inner_text() == ""
    page.locator("#text").fill("e" * 5001)
    until(lambda: page.locator("#error").inner_text().startswith("The text has 5,001 characters"))


def test_sliders_change_the_samples_which_arrive_one_character_after_the_other(show):
    page = show()
    page.evaluate("""() => {
        window.lengths = new Set();
        new MutationObserver(() => lengths.add(document.getElementById("samples-1").innerText.length))
            .observe(document.getElementById("samples-1"), {childList: true, characterData: true, subtree: true});
    }""")
    page.locator("#prompt").fill("o")
    page.locator("#temperature").focus()
    page.keyboard.press("Home")
    assert page.locator("#temperature-value").inner_text() == "0.00"
    page.locator("#prompt").press("Enter")
    until(lambda: page.locator("#sampling").inner_text().startswith("Done"))
    names, text = (served.model.generate("o", 1, temperature=0)[0] for served in page.served.models)
    assert page.locator("#samples-0 bdi").all_text_contents() == [names] * 10
    assert page.locator("#samples-1 bdi").all_text_contents() == [text]
    assert page.evaluate("lengths.size") > 5
    for slider, key, shown in (("temperature", "End", "2.00"), ("top-k", "Home", "1"), ("top-p", "ArrowLeft", "0.95")):
        page.locator(f"#{slider}").focus()
        page.keyboard.press(key)
        assert page.locator(f"#{slider}-value").inner_text() == shown
    page.locator("#sample").click()
    until(lambda: page.locator("#sampling").inner_text().startswith("Done"))
    assert page.locator("#samples-0 bdi").all_text_contents() == [names] * 10  # top-k of 1
    page.evaluate("document.getElementById('sample').click(), document.getElementById('stop').click()")
    until(lambda: page.locator("#sampling").inner_text() == "Stopped.")
    page.locator("#prompt").fill(HOSTILE)
    page.locator("#sample").click()
    until(lambda: "'<' at position 0 of the prompt" in page.locator("#samples-1").inner_text())


def test_the_coin_moves_and_minimise_finds_it(show):
    page = show()

    def numbers():
        return [float(page.locator(f"#{id}").inner_text().split()[0]) for id in ("entropy", "cross-entropy", "kl")]

    def expected(p, q):
        found = coin(p, q)
        return pytest.approx([found[name] for name in ("entropy", "cross_entropy", "kl")], abs=1e-4)

    until(lambda: page.locator("#kl").inner_text())
    assert numbers() == expected(0.8, 0.3)
    for slider, key, p, q in (("p", "ArrowRight", 0.81, 0.3), ("q", "ArrowLeft", 0.81, 0.29), ("p", "End", 1, 0.29)):
        page.locator(f"#{slider}").focus()
        page.keyboard.press(key)
        until(lambda p=p, q=q: numbers() == expected(p, q))
    page.keyboard.press("ArrowLeft")
    page.locator("#minimise").focus()
    page.keyboard.press("Enter")
    until(lambda: page.locator("#steps").inner_text() == "Step 200: stopped.")  # KL is above 1e-6
    for _ in range(9):
        page.locator("#p").press("ArrowLeft")
    page.locator("#minimise").press("Enter")
    until(lambda: page.locator("#steps").inner_text().endswith(": done."))
    assert int(page.locator("#steps").inner_text().split()[1].rstrip(":")) > 5
    assert numbers()[2] == 0
    assert page.locator("#q-value").inner_text().startswith("0.9")
    assert float(page.locator("#dot").get_attribute("cx")) == pytest.approx(30 + 284 * 0.9, abs=2)


def test_a_replaced_model_is_announced_and_the_text_scored_again(show):
    page = show()
    page.locator("#text").fill("em")
    settled(page, "em")
    before = page.locator("#total-0").inner_text()
    save(page.runs[0], ITEMS, "unigram")
    until(lambda: "changed: the page shows the model of step 0" in page.locator("#notice").inner_text())
    until(lambda: page.locator("#total-0").inner_text() != before)
    total = sum(page.served.models[0].score("em", 0)["bits"])
    assert page.locator("#total-0").inner_text().startswith(f"{total:.2f} bits, {total / 2:.3f} bits per character")
    assert "unigram" in page.locator("#models li").first.inner_text()


def test_numbers_that_are_not_finite_are_named(show):
    page = show()
    saved, stoi = untrained_checkpoint(ITEMS, "bigram"), ITEMS.vocabulary.stoi
    for char, value in (("e", math.nan), ("m", -math.inf)):
        saved.weights["log_probs"][:, stoi[char]] = value
    checkpoint.save(page.runs[0], saved)
    until(lambda: "bigram" in page.locator("#models li").first.inner_text())
    page.locator("#text").fill("me")
    assert settled(page, "me") == [["m", "∞"], ["e", "NaN"]]
    assert page.locator("#total-0").inner_text() == "NaN bits, NaN bits per character"
    assert page.locator("#next-0 tr").first.inner_text().split()[-2:] == ["NaN", "%"]
    page.locator("#text").fill("m")
    until(lambda: page.locator("#total-0").inner_text() == "∞ bits, ∞ bits per character")


def test_the_page_can_be_used_by_keyboard_and_heard(show):
    page = show()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the text"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "text"
    name = "all => all.map(one => one.innerText + (one.labels[0]?.innerText || ''))"
    assert all(page.eval_on_selector_all("textarea, input, button", name))
    page.keyboard.type("em")
    settled(page, "em")
    assert "e " in page.locator("#cells-0").get_attribute("aria-label")
    assert [page.locator(f"#{id}").get_attribute("role") for id in ("notice", "error", "curve")] == [
        "status",
        "alert",
        "img",
    ]
