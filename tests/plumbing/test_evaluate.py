"""evaluate.py as a program, on tiny untrained runs: what it writes, keeps, refuses."""
import contextlib
import copy
import io
import json
import math
import os
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import config as C
import data as D
import evaluate as E
from plumbing import drawing
from plumbing import features as X
from plumbing import measuring as Q
from plumbing import runs
from plumbing.settings import override
from plumbing.sources import open_run
from programs import run_here

SMALL = ["--n", "24", "--n-real", "40", "--n-bits", "4", "--device", "cpu"]


def make_run(folder, seed=0, step=10, **settings):
    """A run folder with a checkpoint of a tiny model that learnt nothing."""
    base = override(C.PRESETS["glyphs64"], size=(16,), base_channels=8, emb_channels=16, channel_mult=(1, 2),
                      num_res_blocks=(1,), num_transformer_blocks=1, num_heads=2, sample_steps=2, precision="float32",
                      class_names=tuple(D.CHARACTERS))
    config = override(base, **settings)
    torch.manual_seed(seed)
    model = C.build_model(config)
    for parameter in model.parameters():                                  # away from its zeros: conditions have effects
        torch.nn.init.normal_(parameter, 0, 0.1)
    folder.mkdir(exist_ok=True)
    optimizer = torch.optim.Adam(model.parameters())
    runs.save_checkpoint(str(folder), model, copy.deepcopy(model), optimizer, step, 8 * step, config, 7)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A network of features that is hardly trained: the program is tested here, not the network."""
    trained = X.Yardstick.trained
    monkeypatch.setattr(X.Yardstick, "trained", lambda self, config: dict(trained(self, config, 64, 36),
                                                                                     accuracy=0.99))
    train = X.train_glyph_net
    monkeypatch.setattr(X, "train_glyph_net", lambda *data_and_steps: train(*data_and_steps[:3], 3, 32))


def evaluated(folder, *args):
    assert run_here(E, [folder, *SMALL, *args]) == (None, "")
    path = folder / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_one_run_gives_every_figure_and_the_second_time_draws_nothing(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    first = evaluated(run)
    for key in ("fd_train", "fd_train_pm", "fd_held_out", "is", "read_rate", "precision", "recall", "colour_distance",
                "texture_distance", "bits_per_dim", "nearest_ratio", "command", "seed", "n", "machine", "commit",
                "seconds_of_sampling"):
        assert key in first, key
    assert first["n"] == 24 and first["images_seen"] == 80 and first["bits_per_dim"] > 1
    for name in ("loss_by_logsnr.png", "nearest.png"):
        Image.open(run / name).load()
    monkeypatch.setattr(drawing, "sample_run", None)                            # whoever draws now fails
    for n in ("24", "7"):
        again = evaluated(run, "--n", n)
        assert again["n"] == int(n)
    assert evaluated(run)["fd_train"] == first["fd_train"]
    assert evaluated(run, "--metrics", "bits")["bits_per_dim"] == first["bits_per_dim"]


def test_more_samples_continue_the_set_and_other_settings_start_another(tmp_path):
    """An image is a function of its seed: the first of many are the few. Kills: a cache that mixes settings."""
    run = make_run(tmp_path / "a")

    def images(*args):
        evaluated(run, "--metrics", "none", "--export", tmp_path / "x.npz", *args)
        return np.load(tmp_path / "x.npz")["arr_0"]
    few, many = images("--n", "5"), images("--n", "9")
    assert np.array_equal(few, many[:5])
    for path in run.glob("samples-*.pt"):
        path.unlink()
    assert np.array_equal(images("--n", "9"), many)                       # in two goes as in one
    assert not np.array_equal(few, images("--n", "5", "--seed", "1"))
    assert not np.array_equal(few, images("--n", "5", "--guidance", "2"))
    assert np.array_equal(few, images("--n", "5"))


def test_export_is_what_other_tools_read(tmp_path):
    run = make_run(tmp_path / "a")
    evaluated(run, "--metrics", "none", "--export", tmp_path / "x.npz", "--export-png", tmp_path / "png")
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["arr_0"].shape == (24, 16, 16, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == list(range(24))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "000007.png")), arrays["arr_0"][7])


def test_real_images_scored_as_samples_are_read_and_close():
    """score() of the real scenes themselves. Kills: labels and images that are not in the same order."""
    labels = [i % 36 for i in range(72)]
    features = torch.randn(72, 8, generator=torch.Generator().manual_seed(0))
    heads = {head: torch.eye(4)[torch.arange(72) % 4] for head in ("texture", "letter", "ground", "style")}
    moments = X.Moments(features)
    real = dict(features=features, character=torch.nn.functional.one_hot(torch.tensor(labels), 36).float(),
                colours=torch.ones(64), spread=torch.tensor(0.5), n=72, mean=moments.mean, scatter=moments.scatter,
                labels=labels, **heads)
    yardstick = types.SimpleNamespace(held_out=real, train=real, real_scenes=real,
                                      network=X.GlyphFeatures(torch.nn.Identity(), 0.99))
    result = E.score(real, yardstick, Q.METRICS)
    assert result["read_rate"] == 1 and result["fd_train"] < 1e-6 and result["precision"] == result["recall"] == 1
    assert result["colour_distance"] == result["texture_distance"] == 0 and result["colour_spread"] == 1
    half = dict(real, spread=torch.tensor(0.25))
    assert E.score(half, yardstick, ("style",))["colour_spread"] == 0.5
    shifted = E.score(dict(real, labels=labels[1:] + labels[:1]), yardstick, ("read",))
    assert shifted["read_rate"] == 0
    yardstick.network.accuracy = 0.9                                      # a weak classifier cannot grade samples
    assert "read_rate" not in E.score(real, yardstick, ("read",))


def test_copies_of_training_images_are_found(tmp_path, monkeypatch):
    """Memorisation. Kills: the wrong pairs in the picture; a ratio that does not know copies from new images."""
    g, shown = torch.Generator().manual_seed(0), []
    train, new = torch.randn(30, 8, generator=g), torch.randn(10, 8, generator=g)
    source = types.SimpleNamespace(image=lambda i: torch.full((3, 4, 4), i / 100))
    yardstick = types.SimpleNamespace(train=dict(features=train, indices=torch.arange(100, 130)), source=source,
                                      real_scenes=dict(features=new), held_out=None, network=None)
    monkeypatch.setattr(Q, "grid", lambda tiles, columns: shown.append(tiles) or Image.new("RGB", (1, 1)))
    copies = [7, 3, 21]
    samples = dict(images=torch.zeros(3, 4, 4, 3, dtype=torch.uint8), features=train[copies])
    Q.draw_nearest(samples, yardstick, tmp_path / "p.png", pairs=3)
    assert sorted(round(100 * float(tile[0, 0, 0])) for tile in shown[0][1::2]) == [103, 107, 121]
    ratio = lambda x: E.score(dict(features=x, labels=[-1] * len(x)), yardstick, ("memory",))["nearest_ratio"]
    assert ratio(train[copies]) == 0 and ratio(new) == pytest.approx(1) and 0 < ratio(train[copies] + 0.1) < 0.5


def test_a_second_metric_joins_the_first_and_other_samples_begin_anew(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    whole = evaluated(run, "--metrics", "fd,pr")                          # precision is a measure, no name of a setting
    assert "fd_train" in whole["real_scenes"] and whole["n_train"] == 40
    assert whole["features"] == "FD" and len(whole["features_id"]) == 12 and whole["dtype"] == "float32"
    both = evaluated(run, "--metrics", "bits")
    assert both["fd_train"] == whole["fd_train"] and both["bits_n"] == 4 and both["bits_of"] == "held-out"
    evaluated(run, "--metrics", "none", "--export", tmp_path / "x.npz")
    assert json.loads((run / "evaluation.json").read_text()) == both
    assert "precision" in both
    more = evaluated(run, "--metrics", "is")                              # of the real scenes, too
    assert {"fd_train", "precision", "is"} <= more["real_scenes"].keys()
    few = evaluated(run, "--metrics", "is", "--n-real", "30")             # an fd to 40 images is not one to 30
    assert few["n_train"] == 30 and "fd_train" not in few
    assert "fd_train" not in evaluated(run, "--metrics", "bits", "--seed", "1")
    capsys.readouterr()
    args = types.SimpleNamespace(n=24, metrics=("fd",), first_seed=0)
    yardstick = types.SimpleNamespace(network=X.GlyphFeatures(torch.nn.Identity(), 0.99),
                                      train=dict(mean=torch.zeros(128)))
    Q.introduce(Q.TrainedRun("run", None, C.PRESETS["glyphs64"], "cpu", 1, 1), args, yardstick, "")
    assert "warning: 24 samples for 128 features" in capsys.readouterr().out


@pytest.mark.long
def test_runs_of_other_seeds_have_one_judge_and_runs_of_other_sizes_a_warning(tmp_path, capsys, monkeypatch):
    """Kills: a network for each run, whose distances are then compared."""
    a, b, c = make_run(tmp_path / "a"), make_run(tmp_path / "b", scenes=500), make_run(tmp_path / "c", size=(32, 32))
    ids = {run: evaluated(run, "--metrics", "fd")["features_id"] for run in (a, b, c)}
    assert ids[a] == ids[b] != ids[c]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sys.argv = ["evaluate.py", str(a), str(c), *SMALL, "--metrics", "fd"]
        E.main()
    assert "not measured by the same network" in out.getvalue()
    (tmp_path / "deeper").mkdir()                                         # another folder has a network of its own:
    trained = X.Yardstick.trained
    monkeypatch.setattr(X.Yardstick, "trained", lambda self, config: (state := trained(self, config)) | dict(
        net={name: values + 1e-6 * values.is_floating_point() for name, values in state["net"].items()}))
    d = make_run(tmp_path / "deeper" / "d")
    assert evaluated(d, "--metrics", "fd")["features_id"] != ids[a]       # one recipe, other weights;
    assert run_here(E, [a, d, *SMALL, "--metrics", "fd"]) == (None, "")   # side by side one measures both
    assert [json.loads((run / "evaluation.json").read_text())["features_id"] for run in (a, d)] == [ids[a]] * 2


def test_without_git_the_figures_are_kept(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    monkeypatch.setenv("PATH", "")
    assert evaluated(run, "--metrics", "read")["commit"] == ""


def test_a_nested_run_is_measured_at_its_highest_level(tmp_path, capsys):
    run = make_run(tmp_path / "a", size=(32, 32), patching="none", outer_channels="8,8", outer_blocks="1,1")
    result = evaluated(run, "--export", tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (24, 32, 32, 3)
    assert "fd_train" in result and "bits_per_dim" not in result


def test_sweep_and_comparison(tmp_path):
    a, b = make_run(tmp_path / "a", keep_every=5), make_run(tmp_path / "b", seed=1, keep_every=5)
    assert run_here(E, [a, *SMALL, "--sweep", "guidance=1,2"]) == (None, "")
    swept = json.loads((a / "sweep_guidance.json").read_text())
    assert [row["guidance"] for row in swept["rows"]] == ["1", "2"] and "is" in swept["rows"][0]
    assert swept["rows"][0]["fd_train"] != swept["rows"][1]["fd_train"]
    Image.open(a / "sweep_guidance.png").load()
    assert run_here(E, [a, *SMALL, "--sweep", "sampler=ddpm,ddim", "--metrics", "read"]) == (None, "")
    make_run(a, seed=2, step=15, keep_every=5)
    assert run_here(E, [a, b, *SMALL, "--curve"]) == (None, "")
    assert Image.open(tmp_path / "comparison.png").size[1] > 500          # two rows and a curve
    assert runs.kept_checkpoints(str(a)) == ["checkpoint_0000010.pt", "checkpoint_0000015.pt"]


class Inception(torch.nn.Module):
    def forward(self, x, return_features: bool = False):
        mean = x.mean(dim=(2, 3))
        if return_features:
            return torch.cat([mean, x[:, :, 0, 0]], 1)
        return torch.softmax(mean, 1)


def test_a_folder_needs_features_for_fid_and_gets_the_rest_without(tmp_path, capsys):
    photos, unseen = tmp_path / "photos", tmp_path / "unseen"
    rng = np.random.default_rng(0)
    for i in range(12):
        for folder in (photos / f"class{i % 2}", unseen / f"class{i // 6}"):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (photos / "class0" / "broken.png").write_text("no image")
    run = make_run(tmp_path / "a", data=str(photos), num_classes=2, class_names=("class0", "class1"))
    result = evaluated(run)
    assert "fd_train" not in result and "colour_distance" in result and "bits_per_dim" in result
    torch.jit.script(Inception()).save(str(tmp_path / "net.pt"))
    judge = ["--features", tmp_path / "net.pt", "--held-out"]
    result = evaluated(run, *judge, unseen)
    assert result["fd_train"] > 0 and result["fd_held_out"] > 0 and result["is"] >= 1 and "read_rate" not in result
    assert result["nearest_ratio"] > 0 and result["held_out"] == os.path.realpath(unseen)
    few = X.Yardstick(tmp_path, runs.read_checkpoint(run)["config"], n_real=6, features_file=tmp_path / "net.pt",
                      held_out=str(unseen))
    assert 0 < sum(few.held_out["indices"] < 6) < 6                       # not of the first class alone
    for folder in (photos / "class1", tmp_path):
        status, line = run_here(E, [run, *SMALL, *judge, folder])
        assert status == 2 and "shares images" in line and line.count("\n") == 1


def test_values_that_are_not_finite_stop_it(tmp_path):
    run = make_run(tmp_path / "a")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for value in state["ema"].values():
        value.fill_(1e30)                                                 # NaN is found as the weights are read
    torch.save(state, run / "checkpoint.pt")
    for metrics, wanted in (("fd", "sample 0 holds values that are not finite"), ("bits", "likelihood is not finite")):
        status, line = run_here(E, [run, *SMALL, "--metrics", metrics])
        assert status == 2 and wanted in line and line.count("\n") == 1
    assert not (run / "evaluation.json").exists()


def test_no_measure_ends_the_others(tmp_path, monkeypatch, capfd):
    """One picture again and again has colours of no spread, and a bound may be infinite. Kills: inf in JSON, or a
    measure that takes what was measured before with it."""
    for i in range(4):
        (tmp_path / "same").mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (9, 99, 200)).save(tmp_path / "same" / f"{i}.png")
    torch.jit.script(Inception()).save(str(tmp_path / "net.pt"))
    run = make_run(tmp_path / "a", data=str(tmp_path / "same"), num_classes=0, class_names=())
    monkeypatch.setattr(E, "likelihood", lambda *args: dict(total=torch.full((4,), math.inf)))
    status, lines = run_here(E, [run, *SMALL, "--features", tmp_path / "net.pt"])
    assert status is None and "colour_spread: left out; it is inf" in lines and "bits per dimension: left out" in lines
    assert lines.count("\n") == 2
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["fd_train"] > 0 and "colour_distance" in scores
    assert not {"colour_spread", "bits_per_dim"} & set(scores)
    kept = Q.finite(dict(a=1.0, a_pm=math.nan, b=math.nan, b_pm=0.5, b_n=3))
    assert kept == dict(a=1.0, b_n=3) and "b_pm" not in capfd.readouterr().err
    rows = [dict(s=s, low_res=name, is_pm=0.1, **{"is": 1.0}) for s, name in ((0, "made"), (0, "real"), (1, "made"))]
    del rows[-1]["is"]
    assert Q.draw_sweep_of_s("renoised", rows, str(tmp_path / "s.png"))
    assert Q.draw_sweep("guidance", [dict(guidance="1"), dict(guidance="2", fd_train=1.0)], str(tmp_path / "g.png"))


def test_a_run_on_a_single_image_gives_samples(tmp_path):
    """Kills: a refusal to draw where nothing is compared."""
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "a.png")
    run = make_run(tmp_path / "a", data=str(tmp_path / "one"), num_classes=0, class_names=())
    assert run_here(E, [run, *SMALL, "--metrics", "none", "--export", tmp_path / "x.npz"]) == (None, "")
    status, line = run_here(E, [run, *SMALL])
    assert status == 2 and "one: want two images or more to compare with" in line and line.count("\n") == 1


def test_samples_of_a_damaged_file_are_drawn_again(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    first = evaluated(run, "--metrics", "fd")
    for path in run.glob("samples-*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    status, line = run_here(E, [run, *SMALL, "--metrics", "fd"])
    assert status is None and "damaged, computed again" in line
    assert json.loads((run / "evaluation.json").read_text())["fd_train"] == first["fd_train"]


def test_caches_are_named_by_what_they_depend_on(tmp_path, monkeypatch):
    """Kills: samples of other weights, a network or descriptions of other code; and no cache at all."""
    run = make_run(tmp_path / "a")
    known = set()

    def new():
        evaluated(run, "--metrics", "fd")
        names = {path.name for path in tmp_path.rglob("*-*.pt")} - known
        known.update(names)
        return sorted(name.split("-")[0] for name in names)
    assert new() == ["features", "real", "samples"] and new() == []
    make_run(run, seed=1)
    assert new() == ["samples"]
    monkeypatch.setattr(drawing, "FORMAT", drawing.FORMAT + 1)
    assert new() == ["samples"]
    monkeypatch.setattr(X, "FORMAT", X.FORMAT + 1)
    assert new() == ["features", "real"]


def test_descriptions_are_of_the_images_that_are_there(tmp_path):
    """Kills: a folder that has changed, measured by what it was."""
    torch.jit.script(Inception()).save(str(tmp_path / "net.pt"))
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    config = override(C.PRESETS["glyphs64"], size=(16,), data=str(tmp_path / "photos"), num_classes=0)
    colours = lambda: X.Yardstick(tmp_path, config, features_file=tmp_path / "net.pt").train["colours"]
    before = colours()
    assert torch.equal(before, colours()) and len(list(tmp_path.glob("real-*.pt"))) == 1
    Image.new("RGB", (20, 20), (0, 255, 0)).save(tmp_path / "photos" / "3.png")
    os.utime(tmp_path / "photos" / "3.png", (1, 1))
    assert not torch.equal(before, colours())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_a_full_disk_under_stdout_loses_no_score(tmp_path, monkeypatch):
    """`evaluate.py RUN > log`. Kills: an end at the first line, before anything is measured."""
    run, real = make_run(tmp_path / "a"), contextlib.redirect_stdout
    monkeypatch.setattr(contextlib, "redirect_stdout", lambda _: real(open("/dev/full", "w")))
    for words, name in (((), "evaluation.json"), (("--sweep", "steps=1,2"), "sweep_steps.json")):
        assert run_here(E, [run, *SMALL, "--metrics", "fd", *words]) == (
            None, "stdout: No space left on device; nothing more is printed there\n")
        assert "fd_train" in (run / name).read_text()


@pytest.mark.parametrize("name", [".evaluation.json.lock", "evaluation.json"])
def test_scores_that_cannot_be_written_are_not_measured(tmp_path, name):
    """Kills: a line about it after an hour of work."""
    run = make_run(tmp_path / "a")
    (run / name).mkdir()
    status, error = run_here(E, [run, *SMALL])
    assert status == 2 and f"{name}: not a regular file" in error and error.count("\n") == 1
    assert not list(run.glob("samples-*.pt"))


def test_mistakes_of_evaluate(tmp_path):
    run, other = make_run(tmp_path / "a"), make_run(tmp_path / "b", class_names=("x", "y"), num_classes=2)
    (tmp_path / "png").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("000030.png", "000003.png", "labels.json"):              # the first is of an export of more
        (tmp_path / "png" / name).write_text("")
    cases = [([other], "classes are no longer those of the run"),
             ([run, "--seed", str(10 ** 19)], "want 0 to 2,147,483,647"),
             ([run, "--sweep", "steps=1", "--export", "x.npz"], "not both"),
             ([tmp_path / "none"], "no such run"), ([run, "--metrics", "fid2"], "some of fd"),
             ([run, "--n", "1"], "--n 1: want 2 to 10,000,000"),
             ([run, "--n", str(10 ** 11)], "--n 100000000000: want"), ([run, "--n-bits", "0"], "--n-bits 0: want 2"),
             ([run, "--n-real", "9" * 99], "want 2"),
             ([run, "--n-bits", str(10 ** 7)], "GiB of memory or more"),
             ([run, "--metrics", ","], "want all, none, or some of"),
             ([run, "--metrics", ""], "--metrics is empty"),
             ([run, "--metrics", "fd,"], "want all, none"), ([run, "--guidance", "1e308"], "--guidance 1e+308: want"),
             ([run, "--sweep", "guidance=2,inf"], "--guidance inf: want"), ([run, "--sweep", "steps=0"], "steps 0"),
             ([run, "--sweep", "lr=1"], "FIELD one of"),
             ([run, "--sweep", "guidance=a"], "guidance"), ([run, "--sweep", "guidance"], "FIELD=VALUE"),
             ([run, "--sweep", "sampler=euler"], "sampler"), ([run, "--features", tmp_path / "no.pt"], "no such file"),
             ([run, run, "--export", "x.npz"], "one run"), ([run, "--export", "x.png"], ".npz"), ([], "RUN"),
             ([run, "--export", tmp_path / "no" / "x.npz", "--metrics", "none"], "its folder does not exist"),
             ([run, "--export-png", tmp_path / "file", "--metrics", "none"], "File exists"),
             ([run, "--export-png", tmp_path / "png", "--metrics", "none"], "holds 000030.png"),
             ([run, "--steps", "2,3"], "the two runs of a cascade"),
             ([run, "--curve", "--metrics", "fd"], "keep-every"), ([run, "--curve", "--sweep", "steps=1"], "not both"),
             ([run, "--held-out", tmp_path], "unseen images are drawn"),
             ([run, "--device", "tpu"], "tpu"),
             ([run, "--steps", "0"], "--steps 0"), ([run, "--sweep", "steps=1", "--metrics", "bits"], "metrics")]
    for args, wanted in cases:
        status, line = run_here(E, [*SMALL, *args])
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
        assert line.startswith("evaluate.py: ")


# ---- captions

TEXT = dict(text_encoder="bytes", text_channels=16, text_length=48, text_layers=1, withhold=True)


def test_colours_are_judged_by_pixels():
    """Of 500 real scenes every colour is right. Kills: letter and ground exchanged, the shade or shadow of the ground
    taken for a letter."""
    names = list(D.COLOURS)
    for size, held_out in (((64, 64), True), ((48, 80), False)):
        source = D.Glyphs(size, held_out=held_out)
        images = torch.stack([torch.from_numpy(source.draw(i)) for i in range(250)])
        letter, ground = X.scene_colours(images)
        assert [names[c] for c in letter] == [source.scene(i)["letter"] for i in range(250)]
        assert [names[c] for c in ground] == [source.scene(i)["ground"] for i in range(250)]


def test_captions_are_asked_for_judged_and_composed(tmp_path, monkeypatch):
    """The samples are those of the captions, the answers those of the same scenes. Kills: another order, colours of
    other scenes, withheld pairs among the seen."""
    run = make_run(tmp_path / "a", **TEXT)
    asked, source = [], open_run(override(C.PRESETS["glyphs64_text"], size=(16,)))
    withheld = D.Glyphs((16, 16), pairs="withheld")

    def conditions(config, labels, device, captions, **more):             # what is asked for
        scenes = withheld if captions[0] == withheld.caption(0) else source
        assert captions == [scenes.caption(i) for i in range(24)] and labels == [i % 36 for i in range(24)]
        asked.append(scenes)
        return {}
    perfect = lambda *args, **more: torch.stack([asked[-1].image(i) for i in range(24)])        # draws it
    monkeypatch.setattr(drawing, "make_conditions", conditions)
    monkeypatch.setattr(drawing, "sample_run", perfect)
    result = evaluated(run, "--metrics", "fd,read,words")
    assert len(asked) == 2 and result["letter_colour"] == result["ground_colour"] == 1
    assert result["all_right"] == pytest.approx(result["read_rate"])
    for others in ("withheld_pairs", "real_scenes"):                      # at 16 px a few colours are misread
        assert min(result[others]["letter_colour"], result[others]["ground_colour"]) > 0.9
    monkeypatch.setattr(drawing, "sample_run", lambda *args, **more: perfect(*args).flip(0))
    for path in run.glob("samples-*.pt"):
        path.unlink()
    assert evaluated(run, "--metrics", "words")["letter_colour"] < 0.5


def test_a_run_with_text_is_measured_whole(tmp_path):
    result = evaluated(make_run(tmp_path / "a", **TEXT))
    for key in ("fd_train", "read_rate", "letter_colour", "all_right", "bits_per_dim", "withheld_pairs", "real_scenes"):
        assert key in result, key
    assert result["guidance"] == 3.0                                      # captions can be dropped: there is guidance


def test_a_cascade_with_text_is_refused_in_one_line(tmp_path):
    low = make_run(tmp_path / "a", **TEXT)
    high = make_run(tmp_path / "b", size=(32, 32), low_size=(16, 16), **TEXT)
    status, error = run_here(E, [low, high, "--handoff", "clean", *SMALL])
    assert status == 2 and error.count("\n") == 1 and "can be sampled, but not measured" in error
