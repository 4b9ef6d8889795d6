"""The page of a run, and the sheets of its first minutes."""
import html.parser
import os
import time
from dataclasses import replace
from urllib.parse import unquote, urlsplit

import pytest
import torch
from PIL import Image

import train as T
from config import PRESETS, Config
from plumbing import training, watch
from plumbing.training import EarlySheets, Log, Run
from plumbing.watch import Page
from programs import TINY, checkpoint, run_here


class Reader(html.parser.HTMLParser):
    """Read a page: its tags and attributes, its text, the files that it shows or links to."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        with open(os.path.join(folder, "index.html"), encoding="utf-8") as file:
            self.feed(file.read())
        self.close()
        self.files = [unquote(urlsplit(value).path) for _, attributes in self.tags
                      for key, value in attributes.items() if key in ("src", "href")]
        self.missing = [name for name in self.files if not os.path.isfile(os.path.join(folder, name))]
        self.images = [urlsplit(attributes["src"]).path for tag, attributes in self.tags if tag == "img"]
        self.reloads = [attributes for _, attributes in self.tags if attributes.get("http-equiv") == "refresh"]
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += data.split()


def new_log(folder, **kw):
    """A Log of the default preset in a new folder."""
    os.makedirs(folder, exist_ok=True)
    return Log(str(folder), PRESETS["glyphs64"], active=True, **kw)


# ---- the page

def test_the_page_of_a_run_shows_all_and_reloads_until_the_end(tmp_path, monkeypatch):
    """Kills: a page that goes on to reload, or never does; a picture that is not there; the oldest sheet first; numbers
    of another step; a command to be guessed."""
    folder, seen = tmp_path / "run", []
    monkeypatch.setattr(watch, "RELOAD", 0)                               # anew at every step
    write = Page.write

    def spy(page, *args):
        write(page, *args)
        seen.append((page.step, Reader(folder)))
    monkeypatch.setattr(Page, "write", spy)
    assert run_here(T, [*TINY, "--steps", 4, "--sample-every", 1, "--out", folder]) == (None, "")
    assert all(len(page.reloads) == 1 and not page.missing and not page.open for _, page in seen[:-1])
    assert seen[0][1].images == [] and "0 / 4" in seen[0][1].text
    for step, page in seen[1:-1]:
        assert f"{step} / 4" in page.text and "training" in page.text
    last = seen[-1][1]
    assert not last.reloads and not last.missing and "4 / 4" in last.text and "done" in last.text
    assert last.images == [f"samples_000000{step}.png" for step in (4, 3, 2, 1)] + ["loss.png"]
    assert {"config.json", "log.csv"} <= set(last.files)
    assert f"python sample.py {folder}" in last.text and f"--sample-every 1 --out {folder}" in last.text
    assert {tag for tag, _ in last.tags}.isdisjoint({"script", "link", "iframe"})
    log = open(folder / "log.csv").read().splitlines()[-1].split(",")
    assert f"{float(log[2]):.4f}" in last.text


def test_a_hostile_name_is_only_text(tmp_path):
    """Kills: a folder's name, or a word of the command, that becomes a tag or an attribute."""
    folder = tmp_path / "<script src=x onerror=y>&amp;\"'"
    page = Page(new_log(folder), active=True)
    page.write("stopped", [f"python train.py --resume '{folder}'"])
    read = Reader(folder)
    assert not read.open and {tag for tag, _ in read.tags}.isdisjoint({"script"})
    assert all("onerror" not in attributes for _, attributes in read.tags)
    assert read.text.count("<script src=x onerror=y>&amp;\"'") == 3       # title, head, command


def test_the_page_after_a_resume_shows_the_sheets_up_to_the_checkpoint(tmp_path):
    """Kills: a resumed run's page without the earlier sheets, with one that a killed run drew after its checkpoint, or
    with other times."""
    log = new_log(tmp_path)
    log.start -= 100
    log.row(10, 1.0, 1.0, 1e-3, 50, 0.5)
    log.start -= 100
    log.row(20, 1.0, 1.0, 1e-3, 50)
    for step in (10, 15, 25):
        Image.new("RGB", (40, 30)).save(tmp_path / watch.sheet_name(step))
    page = Page(new_log(tmp_path, first_step=20), active=True, first_step=20)
    page.write()
    read = Reader(tmp_path)
    assert read.images == ["samples_0000015.png", "samples_0000010.png"] and "20 / 6,400" in read.text
    assert "step 15 · 0:02:30" in read.text and "step 10 · 0:01:40" in read.text


def test_a_full_disk_leaves_the_page_that_was_there(tmp_path, monkeypatch, capsys):
    """Kills: a run that ends because its page cannot be written; half a page."""
    page = Page(new_log(tmp_path), active=True)
    page.write()
    before = (tmp_path / "index.html").read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("plumbing.files.os.fsync", full)
    page.write("done")
    assert (tmp_path / "index.html").read_bytes() == before and not list(tmp_path.glob("*.new"))
    assert capsys.readouterr().out == "index.html: No space left on device\n"


def test_what_the_page_takes_is_little_and_no_time_of_training(tmp_path, monkeypatch):
    """A page that takes long to write is written seldom: 2 % of the time. Kills: a share of ten times that; a loss.png
    drawn at every page; images/s that count the drawing."""
    now, spent, log = [1000.0], {"page": 0.0, "loss": 0.0}, new_log(tmp_path)
    for name in ("time", "monotonic"):
        monkeypatch.setattr(time, name, lambda: now[0])

    def take(what, seconds):
        now[0] += seconds
        spent[what] += seconds
    monkeypatch.setattr(Page, "write", lambda page: take("page", 0.3))
    monkeypatch.setattr(log, "draw", lambda: take("loss", 0.4))
    page = Page(log, active=True)
    log.start_clock(0)
    for step in range(1000):
        now[0] += 1.0
        page.refresh()
    assert 0.01 * 1000 < spent["page"] < 0.023 * 1000 and 0.01 * 1000 < spent["loss"] < 0.023 * 1000
    assert log.images_per_second(1000) == pytest.approx(8)


# ---- the first sheets

def drawn_sheets(config, step_seconds, image_seconds, until, before=0.0):
    """Train by a fake clock. -> [(seconds, images of a class, classes), ...], and the largest share that they cost."""
    early, now, step, spent, found, worst = EarlySheets(config, before), before, 0, 0.0, [], 0.0
    while now < until:
        now, step = now + step_seconds, step + 1
        if shape := early.due(step, now, (now - before) / step):
            found.append((now, *shape))
            cost = image_seconds * shape[0] * shape[1]
            now, spent = now + cost, spent + cost
            early.drawn(shape[0] * shape[1], cost)
        worst = max(worst, spent / (now - before))
    return found, worst


LONG = Config(class_names=tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), sample_every=10 ** 9)      # guidance 1


def test_sheets_come_at_15_seconds_and_whenever_the_time_has_doubled():
    """On a quick machine: one of each of 36 classes. Kills: another schedule; sheets after the first full one."""
    found, worst = drawn_sheets(LONG, 0.1, 0.001, 1000)
    assert [round(seconds) for seconds, *_ in found] == [15, 30, 60, 120, 240, 480, 960]
    assert all((columns, rows) == (1, 36) for _, columns, rows in found) and worst < 0.05
    config = replace(LONG, sample_every=1500)
    assert [round(seconds) for seconds, *_ in drawn_sheets(config, 0.1, 0.001, 1000)[0]] == [15, 30, 60, 120]
    config = replace(LONG, sample_every=0)
    assert drawn_sheets(config, 0.1, 0.001, 1000)[0] == []
    assert [round(s) for s, *_ in drawn_sheets(LONG, 0.1, 0.001, 1000, before=100)[0]] == [120, 240, 480, 960]


@pytest.mark.parametrize("step_seconds", (0.02, 0.2, 2, 20, 200))
@pytest.mark.parametrize("batch, guidance", ((16, 5.0), (16, 1.0), (2048, 1.0)))
def test_the_first_sheets_cost_less_than_a_twentieth_of_the_time(step_seconds, batch, guidance):
    """At any speed, if a forward pass takes a third of a step. If it takes a whole one, the first sheet costs twice
    what was reckoned, and the next ones wait. Kills: a cost that forgets guidance or the steps, or what is spent."""
    config = replace(LONG, batch=batch, guidance=guidance)
    image = EarlySheets.STEPS * config.evaluations * step_seconds / (3 * batch)
    found, worst = drawn_sheets(config, step_seconds, image, 2000 * max(step_seconds, 1))
    assert found and worst <= 0.05
    assert all(4 <= columns * rows <= 36 for _, columns, rows in found)
    assert found == sorted(found) and found[-1][2] == 36                  # in the end all classes
    _, worst = drawn_sheets(config, step_seconds, 3 * image, 2000 * max(step_seconds, 1))
    assert worst <= 0.1


def test_few_classes_have_more_images_each():
    for kinds, expected in ((2, (4, 2)), (10, (3, 10)), (100, (1, 36)), (0, (1, 36))):
        config = Config(class_names=tuple(map(str, range(kinds))), num_classes=kinds)
        assert EarlySheets(config, 0).due(10, 1000, 0.01) == expected
    assert EarlySheets(Config(examples=tuple("abcdef")), 0).due(10, 1000, 0.01) == (4, 6)


def test_the_first_sheets_do_not_change_the_training(tmp_path, monkeypatch):
    """A run with a quick sheet after each step ends with the same weights, to the bit, dropout included. Kills: a sheet
    that draws from the generator of training, leaves the model in evaluation mode, or touches the EMA weights."""
    flags = [*TINY, "--steps", 4, "--dropout", 0.1, "--dropout-from-resolution", 16, "--save-every", 4]
    assert run_here(T, [*flags, "--out", tmp_path / "without"]) == (None, "")
    monkeypatch.setattr(EarlySheets, "due", lambda *args: (1, 4))
    assert run_here(T, [*flags, "--out", tmp_path / "with"]) == (None, "")
    assert [Image.open(tmp_path / "with" / watch.sheet_name(step)).size for step in (1, 2, 3)]
    a, b = checkpoint(tmp_path / "without"), checkpoint(tmp_path / "with")
    for part in ("model", "ema"):
        assert all(torch.equal(value, b[part][key]) for key, value in a[part].items())
    assert (tmp_path / "with" / watch.sheet_name(4)).read_bytes() == (tmp_path / "without" /
                                                                      watch.sheet_name(4)).read_bytes()


def test_the_first_sheets_have_few_steps_of_ddim(tmp_path, monkeypatch):
    """Kills: a quick sheet that takes the run's own 24 steps."""
    found = []
    monkeypatch.setattr(training, "class_sheet", lambda model, config, *rest, **more: found.append(config) or
                        Image.new("RGB", (8, 8)))
    config = replace(PRESETS["glyphs64"], sampler="ddpm")
    training.draw_sheet(None, config, "cpu", None, 1, 9, EarlySheets.STEPS)
    training.draw_sheet(None, config, "cpu", None, 4)
    assert [(c.sampler, c.sample_steps) for c in found] == [("ddim", 8), ("ddpm", 24)]


def test_several_processes_have_no_first_sheets(tmp_path):
    """Their clocks do not agree, and every one must take part. Kills: a rank that draws alone."""
    source, model = [], torch.nn.Linear(1, 1)
    more = dict(source=source, model=model, ema=model, optimizer=None, sheet=lambda *a: None, interrupt=object())
    assert Run(str(tmp_path), PRESETS["glyphs64"], world=1, **more).early is not None
    assert Run(str(tmp_path), PRESETS["glyphs64"], world=2, **more).early is None
