"""The tables of benchmarks/RESULTS.md and the numbers of README.md are those in benchmarks/results/."""
import json
import os
import re
import statistics

from programs import ROOT, text_of


def results(name):
    with open(os.path.join(ROOT, "benchmarks", "results", name + ".json")) as file:
        return json.load(file)


def in_row(values, digits=1, scale=1):
    """Return them as a row of a table reads once " | " is ", ": '152.4, 132.7'."""
    return ", ".join(f"{scale * value + 1e-9:,.{digits}f}" for value in values)   # halves go up


def of_tables():
    """Tables 2 to 6: distance without guidance, letters read with it, and the other rows of the page."""
    for file in ("paper_table2", "paper_table3", "paper_table4", "paper_table5-128_px", "paper_table5-256_px-n120",
                 "paper_table6-64_px_128_px", "paper_table6-256_px"):
        sizes = {}
        for row in results(file)["rows"]:
            size = re.match(r"(?:(\d+) px)?", row["row"])[1]               # None: all rows are of one
            sizes.setdefault(size, {}).setdefault(row["equal"], []).append(row)
        for size, by_equal in sizes.items():
            rows, name = by_equal["time"], f"{file}, {size} px"
            yield f"{name}: distance", in_row([row["unguided"]["fd_held_out"] for row in rows])
            if file != "paper_table4":                                    # whose networks are too young to read
                yield f"{name}: read", in_row([row["guided"]["read_rate"] for row in rows], 0, 100)
            if "table6" in file:                                          # a row: distances, guided ones, letters read
                yield f"{name}: guided distance", in_row([row["guided"]["fd_held_out"] for row in rows])
            if file[-1] in "34" or "table5" in file:
                yield f"{name}: guided distance", in_row([row["guided"]["fd_held_out"] for row in rows], 0)
            if "table4" in file or "table5" in file:
                yield f"{name}: equal steps", in_row([row["unguided"]["fd_held_out"] for row in by_equal["steps"]])
                key = "steps_a_second_trained" if size == "256" else "steps_a_second"
                base = rows[1 if "table4" in file else 0][key]            # 100 %: the paper's second row; no patching
                yield f"{name}: speed", in_row([row[key] / base for row in rows], 0, 100)


def of_other_tables():
    """The other tables."""
    best, equal = results("paper_best")["runs"], results("equal_time")["runs"]
    four = ("glyphs64", "glyphs64_unet", "nested", "cascade")
    for minutes in (10, 30, 60):
        rows = [next(row for row in best[name] if row["minutes"] == minutes) for name in four]
        yield f"best, {minutes} minutes: distance", in_row([row["fd_held_out"] for row in rows])
        yield f"best, {minutes} minutes: read", in_row([row["read_rate"] for row in rows], int(minutes > 10), 100)
    for name, rows in equal.items():
        last = rows[-1]
        yield f"equal_time, {name}", in_row([last["fd_held_out"], last["is"], 100 * last["read_rate"]])
    for name in ("grown", "nested", "glyphs64_unet"):
        yield f"mdm, {name}", in_row([row["fd_held_out"] for row in equal[name] if row["minutes"] in (10, 15, 20)])
    for kind in ("made", "real"):
        rows = [row for row in results("sweep_s_renoised")["rows"] if row["low_res"] == kind]
        yield f"s, low-res images {kind}: distance", in_row([row["fd_held_out"] for row in rows])
        yield f"s, low-res images {kind}: read", in_row([row["read_rate"] for row in rows], 0, 100)
    guided = [row for row in results("sweep_guidance")["rows"] if row["guidance"] != "1.05"]
    yield "guidance: distance", in_row([row["fd_train"] for row in guided])
    yield "guidance: inception score", in_row([row["is"] for row in guided])
    yield "guidance: read", in_row([row["read_rate"] for row in guided], 0, 100)
    for schedule in ("interpolated", "shifted"):
        rows = [row for row in results("text_guidance")["rows"]
                if (row["schedule"], row["clip_x"]) == (schedule, "static")]
        yield f"text, {schedule}: distance", in_row([row["seen"]["fd_held_out"] for row in rows])
        yield f"text, {schedule}: all right", in_row([row["seen"]["all_right"] for row in rows], 0, 100)
    for row in results("distillation")["rows"]:
        yield f"distillation, {row['what']}, w = {row['w']}, {row['steps']} steps", ", ".join([
            in_row([row["fd_held_out"]]), in_row([row["read_rate"]], 0, 100),
            in_row([row["seconds_an_image"]], 0 if row["seconds_an_image"] >= 0.01 else 1, 1000) + " ms"])
    sides = {}
    for row in results("speed_growth_cpu")["rows"]:
        sides.setdefault(row["patching"], []).append(row["seconds_a_call"])
    for patching, seconds in sides.items():
        yield f"growth, {patching}", in_row(seconds, 0, 1000)
    for row in results("speed_attention_cpu")["rows"]:
        ms = [1000 * row[key] for key in ("bf16", "float32")]
        yield f"attention, {row['shape']}", in_row(ms, 2 if ms[0] < 10 else 1) + ", " + in_row([ms[0] / ms[1]])
    models = {}
    for row in results("speed_cpu")["rows"]:
        models.setdefault(row["model"], {})[row["variant"]] = row
    for model, by in models.items():
        orders = by["float32"], by["float32, channels_last"]
        steps = [row["seconds_a_step"] for row in (*orders, by["bf16"])]
        yield f"speed, {model}", in_row(steps + [by[v]["seconds_a_call"] for v in ("float32", "bf16")], 0, 1000)
        shares = [max(row[share] for row in orders) for share in ("share_training", "share_sampling")]
        yield f"share, {model}", in_row(shares, 2)
    for file, names in (("peers", ("ours", "ours-none", "diffusers-at-ours")),
                        ("peers-first", ("ours", "diffusers-at-ours", "ddp-unet-at-ours", "ours-without-classes",
                                         "ddp-uvit-at-ours")),
                        ("peers-sampler", ("ours-without-classes", "ours-without-classes-ddpm", "ddp-uvit-at-ours"))):
        for name in names:
            of_it = [result for result in results(file)["results"] if result["name"] == name]
            yield f"{file}, {name}", in_row([sum(result[key] for result in of_it) / len(of_it)
                                             for key in ("fd_held_out", "fd_few")])
    means = [[statistics.mean(row[key] for row in results("peers")["results"] if row["name"] == name)
              for name in ("ours", "diffusers-at-ours")] for key in ("fd_held_out", "fd_few")]
    (ours, theirs), few = means
    yield "peers, ratio", "ours is {:.2f} of that of diffusers (144 samples;\n{:.2f} with 72)".format(
        ours / theirs, few[0] / few[1])
    yield "peers, verdict", f"(#beside-other-libraries), not reached: {ours / theirs:.2f} |"
    for row in results("questions")["targets"]:
        yield f"questions, {row['network']}, {row['target']}", in_row(row["v_mse"], 2)
    now = results("default_guidance")["rows"]
    for key in ("fd_train", "fd_held_out", "is"):
        yield f"default_guidance, {key}", in_row([row[key] for row in now])
    yield "default_guidance, read", in_row([row["read_rate"] for row in now], 0, 100)
    seeds = results("default_seeds")["runs"]
    runs = [row for kind in ("default", "bands", "none") for name, row in seeds.items() if name.startswith(kind)]
    reals = [seeds[f"bands-{seed}"]["real_scenes"] for seed in range(3)]
    for key, digits, unit in (("fd_train", 1, 1), ("fd_held_out", 1, 1), ("is", 1, 1), ("read_rate", 1, 100),
                              ("precision", 2, 1), ("recall", 2, 1)):
        yield f"default_seeds, {key}", in_row([row[key] for row in (*runs, *reals)], digits, unit)
    first = results("pretrained_first")
    yield "pretrained_first", f"{first['real_scenes']['fd_held_out']:.1f}, {first['fd_held_out']:.1f} |"
    for name in ("pretrained", "pretrained_4steps", "pretrained_nested"):
        box = results(name)
        for key in ("fd_train", "fd_held_out"):
            yield f"{name}, {key}", in_row([box[key], box["real_scenes"][key]])
    text = results("pretrained_text")
    yield "pretrained_text, fd", ", –, ".join(in_row([row["fd_held_out"]]) for row in (text, text["real_scenes"]))
    yield "pretrained_text, read", in_row([row["read_rate"] for row in (text, text["withheld_pairs"],
                                                                        text["real_scenes"])], 1, 100)
    kinds = {"real": [*results("grow_video")["real_scenes"].values()]}
    for row in results("grow_video")["rows"]:
        kinds.setdefault(row["kind"], []).append(row)
    for key, digits in (("turn", 2), ("uneven_turn", 2), ("change", 4)):
        yield f"grow_video, {key}", in_row([statistics.mean(row[key] for row in kinds[kind])
                                            for kind in ("scratch", "grown", "real")], digits)
    yield "grow_video, first and last", ", ".join(
        f"{100 * statistics.mean(row[key] for row in kinds[kind]):.1f}" for kind in ("scratch", "grown", "real")
        for key in ("read_frame_0", "read_frame_7"))
    for key, scale in (("read_rate", 100), ("same_letter", 100), ("fd_held_out", 1)):
        of_kind = {kind: [scale * row[key] for row in rows] for kind, rows in kinds.items()}
        yield f"grow_video, {key}", ", ".join(
            f"{statistics.mean(of_kind[kind]):.1f} ({min(of_kind[kind]):.1f} to {max(of_kind[kind]):.1f})"
            for kind in ("scratch", "grown")) + f", {statistics.mean(of_kind['real']):.1f}"
    short = results("minute")
    yield "minute, fd_held_out", in_row([short["fd_held_out"], short["real_scenes"]["fd_held_out"]])
    yield "minute, read", in_row([short["read_rate"], short["real_scenes"]["read_rate"]], 1, 100)
    evaluated = results("glyphs64")
    for key in ("fd_train", "fd_held_out", "is"):
        yield f"glyphs64, {key}", in_row([evaluated[key], evaluated["real_scenes"][key]], 2)


def plain(text):
    """A page without bars, bold and percent signs, and with a table's row as a list: '152.4, 132.7'."""
    return re.sub(r" ± [\d.]+", "", text).replace("*", "").replace(" %", "").replace(" | ", ", ")


def test_the_tables_are_what_was_measured():
    """Each row of the tables, rounded, from benchmarks/results/.

    Kills: a digit mistyped, rows in another order, a measurement made anew and the page left as it was.
    """
    text = plain(text_of("benchmarks/RESULTS.md"))
    missing = {what: row for what, row in [*of_tables(), *of_other_tables()] if row not in text}
    assert not missing


def test_the_readmes_numbers_are_what_was_measured():
    """Kills: a number in README.md that drifts from the tables."""
    text = plain(text_of("README.md"))
    distilled = {(row["what"], row["w"], row["steps"]): row for row in results("distillation")["rows"]}
    peers = [row for row in results("peers")["results"] if row["name"] in ("ours", "diffusers-at-ours")]
    fds = {name: [row["fd_held_out"] for row in peers if row["name"] == name] for name in ("ours", "diffusers-at-ours")}
    seeds = [row for run, row in results("default_seeds")["runs"].items() if run.startswith("default")]
    ends = lambda key, unit=1, digits=1: " to ".join(dict.fromkeys(                             # equal ones: one number
        f"{unit * end(row[key] for row in seeds):.{digits}f}" for end in (min, max)))
    assert f"letters read, three seeds, {ends('read_rate', 100)} of 360" in text
    assert f"{100 * results('minute')['read_rate']:.1f} of 360 letters read" in text
    assert f"{ends('fd_held_out')}, {ends('recall', digits=2)}, the same" in text
    for name in ("pretrained", "pretrained_4steps", "pretrained_nested", "pretrained_text"):
        box = results(name)
        assert re.search(f"{100 * box['read_rate']:.1f}( of [0-9]+)? read, FD {box['fd_held_out']:.1f}", text), name
    assert "FD {:.1f} (ours), {:.1f} (diffusers)".format(*(sum(fd) / len(fd) for fd in fds.values())) in text
    teacher, student = distilled["teacher, DDIM", 2, 256], distilled["guided student", 2, 4]
    kept, faster = (student["read_rate"] / teacher["read_rate"],
                    teacher["seconds_an_image"] / student["seconds_an_image"])
    assert f"{100 * kept:.0f} of the read rate, {faster:.0f} times as fast" in text
    growth = [row for row in results("speed_growth_cpu")["rows"] if row["side"] == 512]
    calls = {row["patching"]: row["seconds_a_call"] for row in growth}
    assert "{:.0f} or {:,.0f} ms".format(1000 * calls["dwt_2"], 1000 * calls["none"]) in text


def test_the_patterns_are_what_was_measured():
    """The rows of benchmarks/NOTEBOOK.md. Kills: a digit mistyped; the weights in the box changed and not measured."""
    rows, text = results("patterns")["rows"], plain(text_of("benchmarks/NOTEBOOK.md"))
    for name, key in (("`pretrained/glyphs64`", "found"), ("possible", "possible")):
        pairs = zip(*([row[key] for row in rows if row["kind"] == kind] for kind in ("striped", "ringed")))
        assert ", ".join([name, *(f"{share:.2f}"[1:] for pair in pairs for share in pair)]) in text, name


def test_the_answers_numbers_are_what_was_measured():
    """Kills: a number in reading/QUESTIONS.md that drifts from the measurement."""
    found, text = results("questions"), plain(" ".join(text_of("reading/QUESTIONS.md").split()))
    errors = {(row["network"][-2:], row["target"]): row["v_mse"] for row in found["targets"]}
    assert "have {:.2f} from x, {:.2f} from v and {:.2f} from ε".format(
        *(errors["48", target][2] for target in ("x", "v", "eps"))) in text
    random, fixed = found["scatter"]["random t"], found["scatter"]["t = 0.5"]
    assert f"a loss of v of {random['mean']:.3f} with a standard deviation of {random['sd']:.3f}" in text
    assert f"it is {fixed['mean']:.3f} and {fixed['sd']:.3f}" in text
    step = min(found["shapes"], key=lambda row: abs(row["t"] - 0.71))
    assert f"lacks {100 * step['coarse']:.0f} of the coarse" in text and f"and {100 * step['detail']:.0f} of" in text
