"""index.html in a run's folder: a page that shows the run while it trains, and reloads itself.

It is plain HTML: no script, nothing from elsewhere. A browser opens it as a file.
"""
import atexit
import html
import os
import re
import shlex
import sys
import time
import warnings

import numpy as np
from PIL import Image

from plumbing.files import reason_of, whole_file
from plumbing.pictures import pyplot

PAGE, RELOAD = "index.html", 5                                            # seconds from one version to the next

COLOURS = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #23231f; --soft: #6f6f68; --line: #e3e2dc; --sea: #2f6f6a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #171816; --ink: #e6e5df; --soft: #96968e; --line: #31322e; --sea: #7cc0b8; } }
"""                                                                       # of this page and of those of reading/
STYLE = COLOURS + """
@media (prefers-color-scheme: dark) {
  .loss img { filter: invert(.9) hue-rotate(180deg); outline-color: #ccc; } }
body { margin: 0 auto; max-width: 58rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 1rem; }
h1 { margin: 0; font-size: 1.4rem; font-weight: 600; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: .8rem; font-weight: 600; color: var(--soft); }
header span { color: var(--sea); font-weight: 600; }
.bar { height: 3px; margin: .9rem 0 1.4rem; background: var(--line); }
.bar div { height: 100%; background: var(--sea); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: 1rem; margin: 0 0 2rem; }
dt, figcaption, footer { font-size: .8rem; color: var(--soft); }
dd { margin: 0; font-size: 1.2rem; }
dd, figcaption { font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; }
pre + figure { margin-top: 2rem; }
img { display: block; max-width: 100%; height: auto; margin-bottom: .4rem; border-radius: 4px;
  outline: 1px solid var(--line); }
.zoomed { image-rendering: pixelated; }
.row { display: flex; gap: 1rem; padding: 1px 1px .75rem; overflow-x: auto; }
.row img { height: 8.5rem; width: auto; max-width: none; }
pre { margin: 0 0 .5rem; padding: .75rem 1rem; border: 1px solid var(--line); border-radius: 6px;
  font: .85rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
a { color: var(--sea); text-underline-offset: .2em; }
footer { margin-top: 2.5rem; }
"""


def clock(seconds):
    """Write seconds as hours, minutes and seconds: 0:04:32."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def sheet_name(step):
    return f"samples_{step:07d}.png"


def after(draw, least=0):
    """Call draw(). Return the time at which it may be called again: in `least` seconds, or later if it is slow."""
    start = time.monotonic()
    draw()
    return start + max(least, 50 * (time.monotonic() - start))


class Page:
    """index.html of a run: sheets, losses, pace, command. If it is not active, every call does nothing.

    log: the run's Log. A full disk does not stop the run: the page that was there before stays.
    """

    def __init__(self, log, active, first_step=0):
        self.log, self.active, self.step = log, active, first_step
        self.next = self.next_loss = 0.0                                  # when to write and to draw again
        self.sheets = self.earlier_sheets(first_step) if active and first_step else {}
        self.quick, self.state = set(), ""                                # steps of the sheets with few sampling steps
        atexit.register(self.tell_of_an_error)

    def earlier_sheets(self, first_step):
        """Find the sheets that a resumed run drew up to its checkpoint: {step: seconds}."""
        rows = self.log.rows() or [dict(step=first_step, seconds=0)]
        steps, seconds = np.array([[float(row["step"]), float(row["seconds"])] for row in rows]).T
        found = [int(name[8:-4]) for name in os.listdir(self.log.folder) if re.fullmatch(r"samples_\d+\.png", name)]
        return {step: float(np.interp(step, steps, seconds)) for step in found if step <= first_step}

    def path(self, name):
        return os.path.join(self.log.folder, name)

    def add_sheet(self, step, is_quick):
        """Show a sheet that was just drawn. is_quick: with few sampling steps, which the page says."""
        self.sheets[step] = self.log.seconds()
        if is_quick:
            self.quick.add(step)

    def tell_of_an_error(self):
        """Stop the reloading if the process ends without a word."""
        if self.state == "training" and os.path.isdir(self.log.folder):
            self.write("stopped by an error")

    def refresh(self):
        """Write the page every five seconds and draw loss.png now and then, each in at most 2 % of the time."""
        start = time.monotonic()
        if not self.active or start < self.next:
            return
        if start >= self.next_loss:
            pyplot()                                                      # its import is slow, but happens once
            self.next_loss = after(self.log.draw)
        self.next = after(self.write, least=RELOAD)
        self.log.since += time.monotonic() - start                             # images_per_second() leaves this out

    def write(self, state="training", what_next=()):
        """Write the page, whole or not at all. It reloads itself while the state is "training".

        what_next: commands that the user may type next.
        """
        if not self.active:
            return
        self.state = state
        try:
            with whole_file(self.path(PAGE), "w", encoding="utf-8", errors="replace") as file:
                file.write(self.text(state, what_next))
        except OSError as error:                                          # a full disk: the run goes on
            self.log.say(f"{PAGE}: {reason_of(error)}")

    def text(self, state, what_next):
        """Build the page."""
        log, step, running = self.log, self.step, state == "training"
        name, steps = html.escape(log.folder), log.config.steps
        left = clock(log.pace(step) * (steps - step)) if step > log.first_step else ""
        facts = {"step": f"{step:,} / {steps:,}", **log.newest} | (
            {"time left": left} if running else {"time": clock(log.seconds())})
        shown = list(filter(self.size_of, sorted(self.sheets, reverse=True)))
        newest, *earlier = shown or [None]
        world = os.environ.get("LOCAL_WORLD_SIZE")
        launcher = ["torchrun", "--nproc_per_node", world] if world else ["python"]
        command = shlex.join([*launcher, os.path.basename(sys.argv[0]), *sys.argv[1:]])
        parts = [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="refresh" content="{RELOAD}">' if running else "",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{100 * step // steps} % {name}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f'<header><h1>{name}</h1><span>{html.escape(state)}</span></header>',
            f'<div class="bar"><div style="width: {100 * step / steps:.1f}%"></div></div>\n<dl>',
            *(f"<div><dt>{what}</dt><dd>{value or '–'}</dd></div>" for what, value in facts.items()), "</dl>",
            "<h2>What to type next</h2>" if what_next else "",
            *(f"<pre>{html.escape(words)}</pre>" for words in what_next),
            self.figure(newest, 928) if newest else "<p>No sheet of samples yet.</p>",
            '<h2>Earlier sheets</h2>\n<div class="row">' if earlier else "",
            *(self.figure(step) for step in earlier), "</div>" if earlier else "", self.loss(),
            f"<h2>Command</h2>\n<pre>{html.escape(command)}</pre>",
            '<p>Every setting is in <a href="config.json">config.json</a>, every logged step in '
            '<a href="log.csv">log.csv</a>.</p>',
            f"<footer>Written {time.strftime('%Y-%m-%d %H:%M:%S')}.</footer>\n</body>\n</html>\n"]
        return "\n".join(filter(None, parts))

    def size_of(self, step):
        """Return (width, height) of a sheet in pixels; None if there is none, or a file that is no picture."""
        path = self.path(sheet_name(step))
        try:
            if os.path.isfile(path):                                      # a pipe would block
                with warnings.catch_warnings(action="ignore"), Image.open(path, formats=["PNG"]) as picture:
                    return picture.size
        except Exception:                                                 # a damaged file fails in many ways
            pass
        return None

    def figure(self, step, room=0):
        """A sheet with its step and time. A small one is enlarged by a whole number, up to `room` pixels wide."""
        name, (width, height) = sheet_name(step), self.size_of(step)
        zoom, quick = max(1, room // width), " · a quick one" if step in self.quick else ""
        return (f'<figure><a href="{name}"><img src="{name}" alt="samples of step {step:,}" '
                f'width="{zoom * width}" height="{zoom * height}"{" class=zoomed" if zoom > 1 else ""}></a>'
                f"<figcaption>step {step:,} · {clock(self.sheets[step])}{quick}</figcaption></figure>")

    def loss(self):
        """loss.png, if it is drawn. The number behind its name changes with it: a browser keeps no old one."""
        path = self.path("loss.png")
        if not os.path.exists(path):
            return ""
        return (f'<h2>Loss</h2>\n<figure class="loss"><img src="loss.png?{os.stat(path).st_mtime_ns}" width="704" '
                'height="396" alt="the loss of each logged step, and the held-out loss"></figure>')
