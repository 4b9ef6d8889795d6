"""Laws of train.py: the losses, what a step draws, EMA, the held-out loss, resuming, data parallel.

Each test names the wrong variant that it kills. The program's command line, log and signals are tested in
plumbing/test_train_programs.py.
"""
import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import config as C
import sample as P
import schedule as S
import train as T
from data import batches
from plumbing import training
from plumbing.settings import override
from plumbing.sources import open_run
from programs import TINY, checkpoint, log_column, run_here, train_tiny
from unet import at_resolution

CPU = torch.device("cpu")


# ---- losses

def test_multiscale_of_white_noise_is_antialiased():
    """Section 3.2: D_s averages, so white noise of variance 1 at 256 has variance 1/64 at 32.

    Kills: bilinear interpolation without antialiasing, which leaves 1/4."""
    noise = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    terms = {s: F.avg_pool2d(noise, 256 // s).square().mean().item() for s in (32, 64, 128, 256)}
    assert terms[32] == pytest.approx(1 / 64, rel=0.05)
    assert T.multiscale_mse(noise, 32).item() == pytest.approx(sum(v / s for s, v in terms.items()), rel=1e-5)
    want = sum((s / 256) ** 2 / s for s in (32, 64, 128, 256))
    assert T.multiscale_mse(noise, 32).item() == pytest.approx(want, rel=0.02)


def test_multiscale_always_holds_the_full_side():
    """The sum goes from the image's side down to the base. Kills: a term below the base; a base above the side."""
    error = torch.randn(1, 3, 64, 64)
    assert_close(T.multiscale_mse(error, 64), error.square().mean() / 64)
    assert_close(T.multiscale_mse(error, 46), error.square().mean() / 64)
    with pytest.raises(ValueError, match="base"):
        T.multiscale_mse(error, 128)


@pytest.mark.parametrize("size, base", [((384, 640), 32), ((640, 384), 32), ((288, 512), 32), ((96, 160), 16),
                                        ((128, 512), 32), ((96, 96), 32), ((104, 104), 8), ((64, 64), 16)])
def test_multiscale_always_holds_the_base(size, base):
    """3.2: "always including" both ends, for each shape. The last map is the one that at_resolution calls base.

    Kills: a base that is lost to rounding (24x40 counts as 32, though sqrt(24 * 40) = 30.98), or where a side stops
    dividing (104 to 6.5). An error of 1 everywhere keeps its size, so its terms 1 / s tell which are there."""
    d, k, want = math.sqrt(size[0] * size[1]), 1, 0.0
    while True:
        want, last = want + k / d, (size[0] / k, size[1] / k)
        if at_resolution(*last, base):
            break
        k *= 2
    assert T.multiscale_mse(torch.ones(1, 1, *size), base).item() == pytest.approx(want, rel=1e-5)


def test_losses_are_the_two_faces_of_one_error():
    """Appendix A: for each example the eps-loss is sigmoid(logsnr) times the v-loss. The network sees logsnr.

    Kills: an eps-loss that is v-MSE, and the reverse; a network that is given t."""
    calls = []

    def model(z, logsnr, cond):
        calls.append((logsnr, cond))
        return torch.zeros_like(z)
    x, eps, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.tensor([0.05, 0.3, 0.6, 0.9])
    logsnr, v = S.logsnr_cosine(t), S.v_from_x_eps(x, eps, S.logsnr_cosine(t))
    v_mse = functools.partial(T.prediction_loss, loss="v_mse")
    assert_close(T.simple_loss(model, x, {"a": 1}, t, eps, S.logsnr_cosine, v_mse), v.square().mean())
    weighted = (torch.sigmoid(logsnr) * v.square().mean((1, 2, 3))).mean()
    assert_close(T.simple_loss(model, x, {"a": 1}, t, eps, S.logsnr_cosine), weighted)
    assert_close(calls[0][0], logsnr)
    assert calls[0][1] == {"a": 1}
    assert_close(T.simple_loss(model, x, {}, t, eps, S.logsnr_cosine, functools.partial(v_mse, multiscale=4)),
                 T.multiscale_mse(v, 4))


# ---- what a step draws

def test_noise_is_a_function_of_seed_step_and_place():
    """t, eps and u of an example depend on (seed, step, place) only. t and u are uniform and independent.

    Kills: noise drawn per rank, which two ranks repeat and a resumed run changes."""
    shapes = [(3, 4, 4), (3, 2, 2)]
    whole = T.draw(1, 7, range(6), shapes, CPU)
    halves = [T.draw(1, 7, places, shapes, CPU) for places in (range(0, 3), range(3, 6))]
    flat = lambda drawn: (drawn[0], *drawn[1], drawn[2])
    for a, b, c in zip(flat(whole), *map(flat, halves)):
        assert torch.equal(a, torch.cat([b, c]))
    assert [eps.shape for eps in whole[1]] == [(6, 3, 4, 4), (6, 3, 2, 2)]
    assert torch.equal(whole[1][0], T.draw(1, 7, range(6), shapes[:1], CPU)[1][0])  # lower levels do not change it
    assert len(set(whole[0].tolist())) == 6
    for other in ((2, 7), (1, 8)):
        assert not torch.equal(whole[1][0], T.draw(*other, range(6), shapes, CPU)[1][0])
    t, eps, u = T.draw(0, 0, range(2000), [(1,)], CPU)
    for uniform in (t, u):
        assert abs(uniform.mean() - 0.5) < 0.03 and abs(uniform.var() - 1 / 12) < 0.01
    assert abs(torch.corrcoef(torch.stack([t, u]))[0, 1]) < 0.08


# ---- EMA

def test_ema_follows_the_step_and_forgets_its_start():
    """The decay is (1 + step) / (10 + step), at most config.ema.

    Kills: a fixed decay, which remembers the initial weights for 1 / (1 - decay) steps; decay and 1 - decay
    exchanged."""
    model = torch.nn.Linear(2, 2)
    ema = copy.deepcopy(model)
    torch.nn.init.ones_(model.weight)
    before = ema.weight.clone()
    T.update_ema(ema, model, 0.9999, 0)
    assert_close(ema.weight, before + (1 - 1 / 10) * (1 - before))
    before = ema.weight.clone()
    T.update_ema(ema, model, 0.5, 10 ** 6)
    assert_close(ema.weight, 0.5 * before + 0.5)
    T.update_ema(ema, model, 0.0, 5)
    assert_close(ema.weight, model.weight)


def initial_weights(**settings):
    """Return the weights with which a tiny run starts."""
    torch.manual_seed(0)
    settings = dict(band_rms="1/1" if "outer_channels" in settings else "1,1,1,1") | settings
    config = override(C.PRESETS["glyphs64"], size=(16,), base_channels=8, emb_channels=16, channel_mult=(1, 2),
                      num_res_blocks=(1,), num_transformer_blocks=1, num_heads=2, **settings)
    return C.build_model(config).state_dict()


def test_the_average_is_taken_after_the_step(tmp_path):
    """After one step the EMA weights are 0.1 of the initial weights and 0.9 of the new ones.

    Kills: an update before the optimizer's step, which lags by one."""
    assert run_here(T, [*TINY, "--steps", 1, "--out", tmp_path / "r", "--warmup", 0]) == (None, "")
    state, start = checkpoint(tmp_path / "r"), initial_weights()
    for key, value in state["ema"].items():
        assert_close(value, 0.1 * start[key] + 0.9 * state["model"][key], atol=1e-6, rtol=0)


def test_load_run_gives_the_averaged_weights(six_steps):
    """A run is sampled with its EMA weights, in eval mode. Kills: sampling the trained weights."""
    model, config = P.load_run(str(six_steps))
    state = checkpoint(six_steps)
    assert not model.training and config.size == (16, 16)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][key])


# ---- the loop

def test_what_the_loop_tells_the_loss_and_the_optimiser(tmp_path, monkeypatch):
    """The loop drops the share --cond-drop of the labels, warms the learning rate up linearly and clips the gradient.

    Kills: labels dropped never or always; no warm-up; betas exchanged; no clipping; a sheet of the trained weights."""
    labels, sheets, loss, sheet = [], [], T.simple_loss, training.class_sheet

    def spy_on_loss(model, x, cond, *rest):
        labels.append(cond["label"])
        return loss(model, x, cond, *rest)

    def spy_on_sheet(model, *rest, **more):
        sheets.append({key: value.clone() for key, value in model.state_dict().items()})
        return sheet(model, *rest, **more)
    monkeypatch.setattr(T, "simple_loss", spy_on_loss)
    monkeypatch.setattr(training, "class_sheet", spy_on_sheet)
    for drop, low, high in ((0, 0, 0), (0.5, 0.25, 0.75), (1, 1, 1)):
        labels.clear()
        out = tmp_path / str(drop)
        assert run_here(T, [*TINY, "--steps", "8", "--batch", "16", "--warmup", "4", "--lr", "0.01", "--cond-drop",
                            drop, "--beta1", "0.5", "--beta2", "0.6", "--adam-eps", "1e-3", "--clip", "1e-6", "--out",
                            out]) == (None, "")
        assert low <= (torch.cat(labels) < 0).float().mean() <= high
        assert list(map(float, log_column(out, "lr"))) == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 5)
        state = checkpoint(out)
        group = state["optimizer"]["param_groups"][0]
        assert tuple(group["betas"]) == (0.5, 0.6) and group["eps"] == 1e-3
        # Gradients of norm 1e-6 under eps 1e-3 hardly move a weight. Without clipping they would move it by about lr.
        start = initial_weights()
        assert max((state["model"][k] - start[k]).abs().max() for k in start) < 1e-3
        for key, value in sheets[-1].items():
            assert torch.equal(value, state["ema"][key])
        assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in start)


def test_the_held_out_loss_is_that_of_the_ema_weights_and_has_no_noise(tmp_path):
    """It sees 32 fixed images with their labels, every level, and the same noise at each call. Training is the same
    with it and without it.

    Kills: the trained weights; noise drawn anew at each call; dropped labels; levels that --mixed-ratio leaves out; an
    effect on the training."""
    args = [*TINY, "--cond-drop", 1, "--mixed-ratio", "1:1", "--outer-channels", "8,8", "--outer-blocks", "1,1",
            "--patching", "none", "--size", 32, "--steps", 4]
    assert run_here(T, [*args, "--held-out-every", 2, "--out", tmp_path / "r"]) == (None, "")
    assert run_here(T, [*args, "--held-out-every", 0, "--out", tmp_path / "without"]) == (None, "")
    column = log_column(tmp_path / "r", "held_out")
    assert [bool(value) for value in column] == [False, True, False, True]
    assert log_column(tmp_path / "without", "held_out") == [""] * 4
    a, b = checkpoint(tmp_path / "r"), checkpoint(tmp_path / "without")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    model, config = P.load_run(str(tmp_path / "r"))
    seen, batch = [], next(batches(open_run(config, held_out=True), 32, config.seed, workers=0))

    def spy(z, logsnr, cond):
        seen.append((cond["label"], *z))
        return model(z, logsnr, cond)
    loss = T.make_held_out_loss(config, spy, batch, None, CPU)
    assert loss() == loss() == pytest.approx(float(column[-1]), rel=1e-4)
    labels, *levels = seen[0]
    assert labels.min() >= 0 and [len(part) for part in (labels, *levels)] == [32, 32, 32]


# ---- one run, however it is cut

def test_resuming_is_the_unbroken_run_to_the_bit(six_steps, tmp_path):
    """Three steps and three more are six steps, to the bit: weights, EMA weights, optimizer state, log.

    Kills: optimizer state, EMA weights, dropout's random state or the place in the data not restored."""
    resumed = tmp_path / "r"
    args = ["--steps", 3, "--out", resumed, "--dropout", 0.1, "--dropout-from-resolution", 16]
    assert run_here(T, [*TINY, *args]) == (None, "")
    assert run_here(T, ["--resume", resumed, "--steps", 6, "--device", "cpu"]) == (None, "")
    a, b = checkpoint(six_steps), checkpoint(resumed)
    for part in ("model", "ema"):
        for key in a[part]:
            assert torch.equal(a[part][key], b[part][key]), (part, key)
    for i, state in a["optimizer"]["state"].items():
        for key in state:
            assert torch.equal(state[key], b["optimizer"]["state"][i][key])
    assert (a["step"], a["images"]) == (b["step"], b["images"])
    assert log_column(six_steps, "loss") == log_column(resumed, "loss")


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, dict(patching="none", outer_channels="8,8", outer_blocks="1,1")])
def test_two_processes_are_one_on_the_joined_batch(tmp_path, settings):
    """Data parallel: two ranks with half the batch each train as one process with the whole batch does.

    Kills: gradients that are not averaged over ranks; --batch taken per rank; ranks that draw the same noise."""
    common = ("--steps", 3, "--dropout", 0, "--adam-eps", 1e-4, "--warmup", 0,  # eps: gradients that are pure rounding
              *(word for key, value in settings.items() for word in ("--" + key, value)))
    assert run_here(T, [*TINY, *common, "--out", tmp_path / "one"]) == (None, "")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    train_tiny(*common, "--out", tmp_path / "two", launcher=torchrun)
    one, two, start = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two"), initial_weights(**settings)
    trained = max((one["model"][k] - start[k]).abs().max().item() for k in start)
    difference = max((one["model"][k] - two["model"][k]).abs().max().item() for k in start)
    assert difference < 1e-3 * trained
    losses = [list(map(float, log_column(tmp_path / name, "loss"))) for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
