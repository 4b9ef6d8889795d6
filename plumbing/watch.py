"""Watch a run: index.html in its folder, a page that reloads itself, and when to draw the sheets of the first minutes.

The page is plain HTML: no script, nothing from elsewhere. A browser opens it as a file.
"""
import html
import math
import os
import re
import shlex
import sys
import time

import numpy as np
from PIL import Image

from plumbing.files import whole_file
from plumbing.pictures import pyplot

PAGE, RELOAD = "index.html", 5                                            # seconds from one version to the next

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfa; --ink: #23231f; --soft: #6f6f68; --line: #e3e2dc; --card: #fff;
  --accent: #2f6f6a; }
@media (prefers-color-scheme: dark) { :root { --paper: #171816; --ink: #e6e5df; --soft: #96968e; --line: #31322e;
  --card: #20211e; --accent: #7cc0b8; } .loss img { filter: invert(.9) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; justify-content: space-between; gap: 0 1rem; }
h1 { margin: 0; font-size: 1.4rem; font-weight: 600; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: .8rem; font-weight: 600; color: var(--soft); }
.state { color: var(--accent); font-weight: 600; }
progress { appearance: none; display: block; width: 100%; height: 3px; margin: .9rem 0 1.4rem; border: 0;
  background: var(--line); }
progress::-webkit-progress-bar { background: var(--line); }
progress::-webkit-progress-value { background: var(--accent); }
progress::-moz-progress-bar { background: var(--accent); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: 1rem; margin: 0; }
dt { font-size: .8rem; color: var(--soft); }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: 0; }
figcaption { margin-top: .4rem; font-size: .8rem; color: var(--soft); font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
.newest img, .earlier img { background: #fff; border: 1px solid var(--line); }
.newest { margin-top: 2rem; }
.loss { width: fit-content; max-width: 100%; border: 1px solid var(--line); border-radius: 4px; overflow: hidden; }
.zoomed { image-rendering: pixelated; }
.earlier { display: flex; gap: 1rem; padding-bottom: .75rem; overflow-x: auto; }
.earlier figure { flex: none; }
.earlier img { height: 8.5rem; width: auto; max-width: none; }
.earlier figcaption { white-space: nowrap; }
pre { margin: 0 0 .5rem; padding: .75rem 1rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); font: .85rem/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
a { color: var(--accent); text-underline-offset: .2em; }
footer { margin-top: 2.5rem; font-size: .8rem; color: var(--soft); }
"""


def clock(seconds):
    """Write seconds as hours, minutes and seconds: 0:04:32."""
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def sheet_name(step):
    return f"samples_{step:07d}.png"


def early_time(seconds):
    """Return the first of 15, 30, 60, 120 ... seconds that is still to come."""
    return 15 * 2 ** max(0, math.floor(math.log2(max(seconds, 1) / 15)) + 1)


class EarlySheets:
    """Say when the first sheets are due: after 15 and 30 seconds, 1, 2, 4, 8 ... minutes, until --sample-every's first.

    They have few sampling steps and one image or more of each class or caption. All of them together cost less than
    5 % of the time. So a sheet that would cost too much has fewer images, or waits until the time has doubled again.
    """
    SHARE, STEPS, MOST, LEAST = 0.05, 8, 36, 4

    def __init__(self, config, seconds_before):
        self.config, self.seconds_before = config, seconds_before         # seconds before the run was resumed
        self.next, self.spent, self.an_image = early_time(seconds_before), 0.0, None            # in seconds

    def due(self, step, seconds, seconds_a_step):
        """Return (images of a class, classes) of the sheet to draw now, or None.

        A forward pass takes about a third of a training step. That tells the first sheet's cost; it is measured then.
        """
        config = self.config
        if step >= config.sample_every or seconds < self.next:
            return None
        self.next = early_time(seconds)
        guess = self.STEPS * config.evaluations * seconds_a_step / (3 * config.batch)
        budget = self.SHARE * (seconds - self.seconds_before) - self.spent
        n = min(self.MOST, int(budget / (self.an_image or guess)))
        if n < self.LEAST:
            return None
        classes = min(n, len(config.examples) or len(config.class_names) or n)
        return min(4, n // classes), classes

    def drawn(self, images, seconds):
        """Note what a sheet cost."""
        self.spent, self.an_image = self.spent + seconds, seconds / images


def after(draw, least=0):
    """Call draw(). Return the time at which it may be called again: in `least` seconds, or later if it is slow."""
    start = time.time()
    draw()
    return start + max(least, 50 * (time.time() - start))


class Page:
    """index.html of a run: sheets, losses, pace, command. If it is not active, every call does nothing.

    log: the run's Log. A full disk does not stop the run: the page that was there before stays.
    """

    def __init__(self, log, active, first_step=0):
        self.log, self.active, self.step = log, active, first_step
        self.next = self.next_loss = 0.0                                  # when to write and to draw again
        self.sheets = self.earlier_sheets(first_step) if active and first_step else {}

    def earlier_sheets(self, first_step):
        """Find the sheets that a resumed run drew up to its checkpoint: {step: seconds}."""
        rows = self.log.rows() or [dict(step=first_step, seconds=0)]
        steps, seconds = np.array([[float(row["step"]), float(row["seconds"])] for row in rows]).T
        found = [int(name[8:-4]) for name in os.listdir(self.log.folder) if re.fullmatch(r"samples_\d+\.png", name)]
        return {step: float(np.interp(step, steps, seconds)) for step in found if step <= first_step}

    def path(self, name):
        return os.path.join(self.log.folder, name)

    def add_sheet(self, step):
        """Show a sheet that was just drawn."""
        self.sheets[step] = self.log.seconds()

    def refresh(self):
        """Write the page every five seconds and draw loss.png now and then, each in at most 2 % of the time."""
        start = time.time()
        if not self.active or start < self.next:
            return
        if start >= self.next_loss:
            pyplot()                                                      # its import is slow, but happens once
            self.next_loss = after(self.log.draw)
        self.next = after(self.write, least=RELOAD)
        self.log.since += time.time() - start                             # images_per_second() leaves this out

    def write(self, state="training", what_next=()):
        """Write the page, whole or not at all. It reloads itself while the state is "training".

        what_next: commands that the user may type next.
        """
        if not self.active:
            return
        try:
            with whole_file(self.path(PAGE), "w", encoding="utf-8", errors="replace") as file:
                file.write(self.text(state, what_next))
        except OSError as error:                                          # a full disk: the run goes on
            self.log.say(f"{PAGE}: {error.strerror}")

    def text(self, state, what_next):
        """Build the page."""
        log, step, running = self.log, self.step, state == "training"
        name, steps = html.escape(log.folder), log.config.steps
        left = clock(log.pace(step) * (steps - step)) if step > log.first_step else ""
        facts = {"step": f"{step:,} / {steps:,}", **log.newest} | (
            {"time left": left} if running else {"time": clock(log.seconds())})
        shown = [step for step in sorted(self.sheets, reverse=True) if os.path.exists(self.path(sheet_name(step)))]
        newest, *earlier = shown or [None]
        command = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
        parts = [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="refresh" content="{RELOAD}">' if running else "",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{100 * step // steps} % {name}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f'<header><h1>{name}</h1><span class="state">{html.escape(state)}</span></header>',
            f'<progress value="{step}" max="{steps}"></progress>\n<dl>',
            *(f"<div><dt>{what}</dt><dd>{value or '–'}</dd></div>" for what, value in facts.items()), "</dl>",
            "<h2>What to type next</h2>" if what_next else "",
            *(f"<pre>{html.escape(words)}</pre>" for words in what_next),
            self.figure(newest, "newest") if newest else '<p class="newest">No sheet of samples yet.</p>',
            '<h2>Earlier sheets</h2>\n<div class="earlier">' if earlier else "",
            *(self.figure(step) for step in earlier), "</div>" if earlier else "", self.loss(),
            f"<h2>Command</h2>\n<pre>{html.escape(command)}</pre>",
            '<p>Every setting is in <a href="config.json">config.json</a>, every logged step in '
            '<a href="log.csv">log.csv</a>.</p>',
            f"<footer>Written {time.strftime('%Y-%m-%d %H:%M:%S')}.</footer>\n</body>\n</html>\n"]
        return "\n".join(filter(None, parts))

    def figure(self, step, kind=""):
        """A sheet with its step and time. The newest one is enlarged by a whole number if it is small."""
        name = sheet_name(step)
        with Image.open(self.path(name)) as picture:
            width, height = picture.size
        zoom = max(1, 928 // width) if kind == "newest" else 1
        return (f'<figure class="{kind}"><a href="{name}"><img src="{name}" alt="samples of step {step:,}" '
                f'width="{zoom * width}" height="{zoom * height}"{" class=zoomed" if zoom > 1 else ""}></a>'
                f"<figcaption>step {step:,} · {clock(self.sheets[step])}</figcaption></figure>")

    def loss(self):
        """loss.png, if it is drawn. The number behind its name changes with it: a browser keeps no old one."""
        path = self.path("loss.png")
        if not os.path.exists(path):
            return ""
        return (f'<h2>Loss</h2>\n<figure class="loss"><img src="loss.png?{os.stat(path).st_mtime_ns}" width="704" '
                'height="396" alt="the loss of each logged step, and the held-out loss"></figure>')
