"""The page of the data check: what it holds, and what a person can do with it in a browser.

The browser tests need Debian's chromium and the playwright package; they are skipped where one is absent.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from meme_llava.dataset.check import CheckedData, CheckedRecord
from meme_llava.dataset.conversation import Tokens, Turn
from meme_llava.dataset.findings import Finding, RecordPolicy
from meme_llava.dataset.records import Record
from meme_llava.report.data_check import CheckArguments, Histogram, render_check_page

ATTACK = (
    '</script></template><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'"&amp;{{7*7}}\u2028'
)
# A separator that would break a line is written out.
SHOWN_ATTACK = ATTACK.replace("\u2028", "⟨U+2028⟩")
FACTS = [("records", "1,234"), ("bad 不可用", "14"), ("policy", "quarantine")]
HISTOGRAMS = [Histogram("Positions", "tokens", [0, 10, 20, 30], [3, 0, 1500])]


def make_record(
    number: int, record_id: str, kinds: str, source: str, positions: int | None, answer: str, *images: Path
) -> CheckedRecord:
    """A record whose question names its id; `kinds` are those of its findings, with spaces between."""
    place = f"train.json record {number}"
    turns = (Turn("user", f"<image>\n{record_id}写了什么？"), Turn("assistant", answer))
    findings = [Finding(kind, place, record_id, f"{kind} of {record_id}") for kind in kinds.split()]
    tokens = None if positions is None else Tokens(np.zeros(0), np.ones(len(answer) + 1, bool), positions, 0)
    return CheckedRecord(Record(record_id, place, (), turns, source=source), images, findings, tokens)


def change(checked: CheckedRecord, **values) -> CheckedRecord:
    """The record with other values of its own, of its images or its findings."""
    others = {name: values.pop(name) for name in ("image_paths", "findings") if name in values}
    return replace(checked, record=replace(checked.record, **values), **others)


def make_records(folder: Path) -> list[CheckedRecord]:
    good, damaged = folder / "good.png", folder / "damaged.png"
    Image.new("RGB", (400, 100), (200, 60, 20)).save(good)
    damaged.write_bytes(b"nonsense")
    return [
        make_record(3, "a", "damaged_image", "one", 50, "好耶", damaged),
        make_record(10, "b", "transparent", "two", 300, "收到", good),
        make_record(2, "c", "", "two", 100, "摸鱼中" * 200, good),
        make_record(1, "d", "animated damaged_image", "one", 90, "困ABC", good, damaged),
        make_record(9, "e", "loop damaged_image", "one", None, "好好", folder / "missing.png"),
        make_record(11, "f", "transparent", "two", 100, "别催了", good),
    ]


def write_page(
    path: Path,
    records: Sequence[CheckedRecord],
    facts: list[tuple[str, str]] = FACTS,
    histograms: list[Histogram] = HISTOGRAMS,
    name: str = "train.json",
    shown: int = 1000,
    malformed: Sequence[Finding] = (),
) -> str:
    checked = CheckedData(Path("train.json"), RecordPolicy(), list(records), list(malformed), {})
    arguments = CheckArguments(annotations=Path(name), image_folder=path.parent, report_records=shown)
    page = render_check_page(checked, facts, histograms, arguments)
    path.write_text(page, encoding="utf-8")
    return page


def make_hostile_record(folder: Path) -> CheckedRecord:
    """The attack in every text that can come from data, and in a file's name."""
    image = folder / ATTACK.rpartition("/")[2]
    Image.new("RGB", (8, 8)).save(image, "PNG")
    place = f"{ATTACK} 1"
    return CheckedRecord(
        Record(ATTACK, place, (), tuple(Turn(role, ATTACK) for role in ("system", "user", "assistant")), source=ATTACK),
        (image, folder / f"missing {ATTACK}"),
        [Finding("loop", place, ATTACK, ATTACK), Finding("loop", place, ATTACK + "2", ATTACK)],
    )


def read_images(page: str) -> list[str]:
    return json.loads(re.search(r'<script type="application/json" id="images">(.*?)</script>', page)[1])


def test_the_page_loads_nothing_and_allows_no_script_but_its_own(tmp_path):
    page = write_page(tmp_path / "report.html", make_records(tmp_path))
    assert "http:" not in page and "https:" not in page and "//" not in re.sub(r"(?s)<script.*?</script>", "", page)
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [link for link in links if not link.startswith("#")] == ["data:,"]
    (script,) = re.findall(r"(?s)<script>(.*?)</script>", page)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_equal_data_give_equal_pages(tmp_path):
    assert write_page(tmp_path / "a.html", make_records(tmp_path)) == write_page(
        tmp_path / "b.html", make_records(tmp_path)
    )


def test_an_image_becomes_one_small_thumbnail_however_often_it_is_used(tmp_path):
    urls = read_images(write_page(tmp_path / "report.html", make_records(tmp_path)))
    # missing.png, good.png, damaged.png in the order of their first use, the worst records first.
    assert [bool(url) for url in urls] == [False, True, False]
    thumbnail = Image.open(io.BytesIO(base64.b64decode(urls[1].removeprefix("data:image/webp;base64,"))))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (200, 50))


def test_half_characters_and_reordering_controls_are_written_out(tmp_path):
    text = "\ud83d半 \u202egnp.exe\u202c \x00\x1b zero\u200bwidth 👨‍👩‍👧"
    # Neither name can be looked up on any disk.
    images = (tmp_path / "\ud83d.png", tmp_path / "a\0b.png")
    record = change(
        make_records(tmp_path)[0], turns=(Turn("user", text),), record_id=text, source=text, place=f"{text} 1"
    )
    page = write_page(tmp_path / "report.html", [replace(record, image_paths=images)], name=text)
    shown = "⟨U+D83D⟩半 ⟨U+202E⟩gnp.exe⟨U+202C⟩ ⟨U+0000⟩⟨U+001B⟩ zero⟨U+200B⟩width 👨‍👩‍👧"
    assert page.count(shown) == 7  # two titles, id, place, question, source and the list of sources
    assert "⟨U+D83D⟩.png" in page and "a⟨U+0000⟩b.png" in page


def test_bars_say_what_they_stand_for_and_axes_have_round_marks(tmp_path):
    histograms = [Histogram("Pixels", "pixels", [0, 1000, 2000, 3000], [1500, 1, 0])]
    page = write_page(tmp_path / "report.html", make_records(tmp_path), histograms=histograms)
    titles = ["0 – 1,000 pixels: 1,500", "1,000 – 2,000 pixels: 1", "2,000 – 3,000 pixels: 0"]
    assert re.findall(r"<g><title>([^<]*)</title>", page) == titles
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", page)
    assert {"0", "500", "1,500", "1,000", "2,000", "3,000", "pixels"} <= set(texts)


def test_a_check_without_records_and_findings_has_a_page_too(tmp_path):
    page = write_page(tmp_path / "report.html", [], [], [])
    assert "Nothing was found." in page and "showing all 0" in page


@pytest.fixture
def open_page(browser, tmp_path):
    """Write the page, open it from its file and give it back; at the end nothing may have gone wrong in it."""
    contexts, complaints, requests = [], [], []

    def open_it(records: Sequence[CheckedRecord], width: int = 1280, color_scheme: str = "light", **values):
        report = tmp_path / "report.html"
        write_page(report, records, **values)
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=color_scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []
    address = (tmp_path / "report.html").as_uri()
    assert {url for url in requests if not url.startswith("data:")} == {address}


def list_ids(page) -> list[str]:
    return page.locator(".card h3").all_inner_texts()


def test_the_page_opens_with_counts_findings_and_images(open_page, tmp_path):
    # The worst, then noted and clean ones half and half.
    page = open_page(make_records(tmp_path), shown=5)
    assert page.title() == "Data check: train.json"
    tiles = [tile.split("\n") for tile in page.locator(".tile").all_inner_texts()]
    assert sorted(map(sorted, tiles)) == [["1,234", "Records"], ["14", "Bad 不可用"]]
    assert page.locator(".details").inner_text().split("\n") == ["Policy", "quarantine"]
    # Bad kinds first, then by number.
    assert page.locator(".kinds .chip").all_inner_texts() == ["damaged_image", "loop", "transparent", "animated"]
    assert page.locator(".kinds td.number").all_inner_texts() == ["3", "1", "2", "1"]
    assert page.locator(".kinds .examples").first.locator("> *").all_inner_texts() == ["d", "a"]
    assert "showing 5 of 6" in page.locator("#records").inner_text()
    assert {"e", "d", "a", "c"} <= set(list_ids(page))
    card = page.locator(".card", has_text="train.json record 2")
    assert card.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [200, 50]
    assert "good.png · 400×100" in card.inner_text() and "<image>c写了什么？" in card.inner_text()
    assert "loop of e" in page.locator(".card", has_text="train.json record 9").inner_text()


def test_a_file_that_cannot_be_shown_has_a_placeholder_with_the_reason(open_page, tmp_path):
    page = open_page(make_records(tmp_path))
    page.fill("[name=query]", "a写了")
    damaged = page.locator(".card .broken")
    assert damaged.is_visible() and damaged.inner_text().startswith("not a ")
    assert "damaged.png" in page.locator(".card figcaption").inner_text()
    page.fill("[name=query]", "e写了")
    assert page.locator(".card .broken").inner_text() == "No such file or directory"


def test_a_detail_names_an_image_only_where_there_are_several(open_page, tmp_path):
    record = make_records(tmp_path)[0]
    good, damaged = tmp_path / "good.png", tmp_path / "damaged.png"
    findings = [replace(record.findings[0], detail=f"{damaged}: 8 bytes")]
    records = [
        change(record, place=f"train.json record {number}", image_paths=images, findings=findings)
        for number, images in ((3, (damaged,)), (4, (good, damaged)), (5, (good,)))
    ]
    page = open_page(records)
    assert page.locator(".detail").all_inner_texts() == ["8 bytes", "damaged.png: 8 bytes", f"{damaged}: 8 bytes"]


def test_the_order_is_worst_first_then_that_of_the_files_or_the_lengths(open_page, tmp_path):
    page = open_page(make_records(tmp_path))
    # e: two bad; d: one bad, one noted; a: one bad; b and f: one noted, record 10 and 11; c: none.
    assert list_ids(page) == ["e", "d", "a", "b", "f", "c"]
    page.select_option("[name=sort]", "file")
    assert list_ids(page) == ["d", "c", "a", "e", "b", "f"]
    page.select_option("[name=sort]", "longest")
    assert list_ids(page) == ["b", "f", "c", "d", "a", "e"]


def test_filters_and_search_leave_what_they_say(open_page, tmp_path):
    page = open_page(make_records(tmp_path))
    assert page.locator("#matching").inner_text() == "6"
    page.get_by_label("Noted").check(force=True)
    assert list_ids(page) == ["b", "f"]
    page.get_by_label("Clean").check(force=True)
    assert list_ids(page) == ["c"]
    page.get_by_label("Bad").check(force=True)
    assert list_ids(page) == ["e", "d", "a"]
    page.select_option("[name=kind]", label="loop (1)")
    assert list_ids(page) == ["e"]
    page.select_option("[name=source]", label="two (3)")
    assert list_ids(page) == [] and page.locator("#nothing").is_visible()
    page.get_by_role("button", name="Reset").click()
    page.locator("#matching", has_text=re.compile("^6$")).wait_for()
    page.select_option("[name=source]", label="two (3)")
    assert list_ids(page) == ["b", "f", "c"]
    page.get_by_role("button", name="Reset").click()
    page.locator("#matching", has_text=re.compile("^6$")).wait_for()
    page.fill("[name=query]", "困ａbc")  # of any width and case
    assert list_ids(page) == ["d"]
    page.fill("[name=query]", "f写了什么")
    assert list_ids(page) == ["f"]


def test_a_kind_of_the_table_filters_the_gallery_and_lets_it_go(open_page, tmp_path):
    page = open_page(make_records(tmp_path))
    button = page.get_by_role("button", name="transparent")
    button.focus()
    page.keyboard.press("Enter")
    assert list_ids(page) == ["b", "f"] and button.get_attribute("aria-pressed") == "true"
    button.click()
    assert len(list_ids(page)) == 6 and button.get_attribute("aria-pressed") == "false"
    page.locator(".kinds").get_by_role("button", name="e", exact=True).click()
    assert page.locator("[name=query]").input_value() == "e"


def test_a_long_answer_unfolds_and_folds(open_page, tmp_path):
    page = open_page(make_records(tmp_path))
    assert page.locator("[data-fold]").count() == 1
    text = page.locator(".card", has_text="record 2").locator(".assistant .text")
    folded = text.bounding_box()["height"]
    page.get_by_role("button", name="more 展开").click()
    assert text.bounding_box()["height"] > 2 * folded
    page.get_by_role("button", name="less 收起").click()
    assert text.bounding_box()["height"] == folded


def test_long_conversations_and_malformed_records_are_shown(open_page, tmp_path):
    turns = tuple(Turn("user" if index % 2 == 0 else "assistant", f"turn {index}") for index in range(6))
    malformed = [Finding("malformed", "train.json record 7", "m", "is a list, expected an object")]
    page = open_page([change(make_records(tmp_path)[1], turns=turns)], malformed=malformed)
    assert "no conversation" in page.locator(".card").first.inner_text()
    assert not page.get_by_text("turn 5").is_visible()
    page.get_by_text("2 more turns").click()
    assert page.get_by_text("turn 5").is_visible()


def test_many_records_are_shown_in_portions(open_page):
    page = open_page([make_record(number, f"r{number}", "", "one", number, "好耶") for number in range(150)])
    assert page.locator(".card").count() == 60 and "showing all 150" in page.locator("#records").inner_text()
    more = page.locator("#more")
    assert "90 left" in more.inner_text()
    more.click()
    more.click()
    assert list_ids(page) == [f"r{number}" for number in range(150)] and not more.is_visible()


def test_nothing_in_the_data_runs_and_all_of_it_is_read_as_it_stands(open_page, tmp_path):
    facts, histograms = [(ATTACK, ATTACK), (ATTACK, "1")], [Histogram(ATTACK, ATTACK, [0, 1], [1])]
    page = open_page([make_hostile_record(tmp_path)], facts=facts, histograms=histograms, name=ATTACK.replace("/", "∕"))
    assert page.evaluate("window.hacked") is None
    assert page.title() == f"Data check: {SHOWN_ATTACK.replace('/', '∕')}"
    assert page.locator(".tile dt").text_content() == SHOWN_ATTACK
    assert page.locator(".details dd").text_content() == SHOWN_ATTACK
    assert page.locator(".kinds .examples > *").all_text_contents() == [SHOWN_ATTACK, SHOWN_ATTACK + "2"]
    assert page.locator(".card .place").text_content() == SHOWN_ATTACK + " 1"
    assert page.locator(".histogram h3").text_content() == page.locator(".card h3").text_content() == SHOWN_ATTACK
    assert page.locator(".card .detail").all_text_contents() == [SHOWN_ATTACK] * 2
    assert page.locator(".histogram svg title").text_content() == f"0 – 1 {SHOWN_ATTACK}: 1"
    assert page.locator(".card .text").all_text_contents() == [SHOWN_ATTACK] * 3
    assert page.locator(".card footer span").first.text_content() == SHOWN_ATTACK
    assert page.locator("[name=source] option").nth(1).text_content() == f"{SHOWN_ATTACK} (1)"
    name = SHOWN_ATTACK.rpartition("/")[2]
    assert page.locator(".card img").get_attribute("alt") == name
    assert page.locator(".card figcaption").all_text_contents() == [f"{name} · 8×8", name]
    # The filters work with such names, too, and nothing new comes in through them.
    page.locator(".kinds [data-kind]").click()
    page.locator(".kinds [data-example]").click()
    assert page.locator(".card").count() == 1
    assert page.locator("img").count() == 1 and page.locator("script").count() == 2
    assert page.evaluate("window.hacked") is None


def test_a_script_that_got_into_the_page_would_not_run(browser, tmp_path):
    report = tmp_path / "report.html"
    write_page(report, make_records(tmp_path))
    injected = '<script>window.hacked=1</script><img src="data:," onerror="window.hacked=1"></main>'
    report.write_text(report.read_text(encoding="utf-8").replace("</main>", injected), encoding="utf-8")
    page = browser.new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(report.as_uri())
    page.locator(".card").nth(5).wait_for()
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert len(complaints) == 2 and all("Content Security Policy" in complaint for complaint in complaints)
    page.close()


@pytest.mark.parametrize(("width", "color_scheme"), [(390, "light"), (390, "dark"), (800, "light"), (1280, "light")])
def test_nothing_is_wider_than_the_window(open_page, tmp_path, width, color_scheme):
    long = "x" * 300
    records = make_records(tmp_path)
    record = change(
        records[1],
        place=f"{long} 1",
        record_id=long,
        source=long,
        turns=(Turn("user", long), Turn("assistant", long)),
        findings=[Finding("loop", f"{long} 1", long, long), Finding("stretched_shape", f"{long} 1", long, long)],
        image_paths=(tmp_path / long[:250], tmp_path / "good.png"),
    )
    page = open_page(
        [record, *records, change(record, place=f"{long} 2", image_paths=())],
        width,
        color_scheme,
        name=long,
        facts=[(long, long), (long, "123456789"), *FACTS],
        histograms=[*HISTOGRAMS, Histogram(long, "pixels", list(range(0, 31_000_000, 10**6)), [1] * 30)],
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    inner = "panels => panels.filter(panel => panel.scrollWidth > panel.clientWidth).map(panel => panel.className)"
    assert page.locator(".panel").evaluate_all(inner) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.search(r"\d+", background)[0]) < 60) == (color_scheme == "dark")
