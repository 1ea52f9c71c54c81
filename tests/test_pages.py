"""Commands' pages and README's picture: what they say is what the program says."""

import re
import xml.etree.ElementTree as xml

import pytest

from lorakit.core.config import CONFIGS
from tests.pages import OPTIONS, PAGES, options, page
from tests.picture import COMMANDS, PICTURE, draw, settled


@pytest.mark.parametrize("name", CONFIGS)
def test_a_page_is_what_the_config_says(name: str) -> None:
    """`python -m tests.pages` writes them anew."""
    assert (PAGES / f"{name}.md").read_text(encoding="utf-8") == page(name)


def test_the_options_are_what_the_configs_say() -> None:
    """`python -m tests.pages` writes them anew."""
    assert OPTIONS.read_text(encoding="utf-8") == options()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_page_holds_every_option_once(name: str) -> None:
    labels = re.findall(r"^\| `(.+?)[` ]", page(name), re.MULTILINE)
    settings = CONFIGS[name].settings().values()
    assert len(labels) == len(settings)
    assert {label.removeprefix("--no-").removeprefix("--") for label in labels} == {
        knob.label.removeprefix("--") for knob in settings
    }


def test_there_is_a_page_for_each_command_and_no_other() -> None:
    assert {path.stem for path in PAGES.iterdir()} == set(CONFIGS)


def test_the_picture_is_small_whole_and_fetches_nothing() -> None:
    text = PICTURE.read_text(encoding="utf-8")
    assert len(text.encode()) < 100_000
    root = xml.fromstring(text)
    assert root.tag.endswith("svg")
    assert not re.search(r"url\((?!#)|href|@import|<script", text)
    shown = "".join(root.itertext()).replace("\xa0", " ")
    for command in COMMANDS:
        assert command[:40] in shown
    assert all(result in shown for result in ("It fits:", "trained tokens", "tokens/s", "merged model"))
    assert "error:" not in shown
    assert "/tmp" not in shown
    assert "/root" not in shown


def test_a_picture_is_drawn_from_bytes_of_a_terminal() -> None:
    drawn = draw([("lorakit x", "\x1b[1mloss\x1b[0m  <1.5> & less")])
    xml.fromstring(drawn)
    assert "&lt;1.5&gt;" in drawn
    assert "url(http" not in drawn
    assert settled("a\r\ntraining 1/3\r\x1b[2Ktraining 3/3\r\n\x1b[?25h\r\x1b[1A\x1b[2Kdone\r\n") == "a\ndone"
