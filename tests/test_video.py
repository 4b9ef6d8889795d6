"""The laws of video.py."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import config as C
import nested_unet as N
import sample as P
import schedule as S
import train as T
import video as V
from data import Glyphs
from plumbing.motion import in_motion
from programs import page
from test_models import small_unet, small_uvit, stir
from test_nested_unet import nest, noises

LABEL = {"label": torch.tensor([1, -1])}
TINY = dict(model="uvit", size=(16, 16), patching="dwt_1", base_channels=8, emb_channels=16, channel_mult=(1, 2),
            num_res_blocks=(1,), num_transformer_blocks=1, num_heads=2, dropout=0.0, transformer_dropout=0.0,
            noise_d=16, loss="band_mse", precondition="bands", num_classes=5, outer_channels="8", outer_blocks="1",
            outer_patching="dwt_1", batch=2)


def tiny(frames="4:1", **kw):
    """The configuration of a level of time: several frames of 16 px over one."""
    config = C.replace(C.GLYPHS, **{**TINY, "frames": frames, **kw})
    rms = [",".join(f"{s / (1 + k):.4g}" for s in (0.6, 0.1, 0.1, 0.05) for k in range(T)) for T in config.counts]
    return C.replace(config, band_rms="/".join(rms))


def videos(config, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for shape in config.shapes]


def opened(model, seed=3):
    """Give the layers that start at zero small random weights: then frames and levels see each other."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def frame_of(v, i):
    return v[:, 3 * i:3 * i + 3]


# ---- the process

def test_time_keeps_frames_and_space_averages_pixels():
    """Kills: frames that are averaged; the last frame of k in place of the first; frames of another video."""
    x = torch.randn(2, 3 * 8, 16, 24)
    high, low, lowest = V.video_pyramid(x, [(16, 24), (8, 12), (8, 12)], [8, 4, 1])
    assert high is x
    for i in range(4):
        assert_close(frame_of(low, i), F.avg_pool2d(frame_of(x, 2 * i), 2))
    assert torch.equal(lowest, frame_of(low, 0))
    sizes, image = [(16, 24), (8, 12), (2, 3)], torch.randn(2, 3, 16, 24)
    assert all(map(torch.equal, V.video_pyramid(image, sizes, [1, 1, 1]), N.pyramid(image, sizes)))


def test_frames_fold_and_unfold():
    """Kills: frames of all videos mixed; colours in the place of frames."""
    x = torch.randn(2, 3 * 4, 5, 6)
    frames = V.to_frames(x, 4)
    assert all(torch.equal(frames[4 * b + t], frame_of(x[b:b + 1], t)[0]) for b in range(2) for t in range(4))
    assert torch.equal(V.to_videos(frames, 4), x)


def test_only_what_is_averaged_shifts_measured_on_noise():
    """Eq. 4 of simple diffusion for frames. Kills: a shift by time although frames are kept."""
    shape, frames = (64, 3 * 8, 16, 16), lambda x: x.unflatten(1, (8, 3))
    keep = lambda x: V.video_pyramid(x, [(16, 16)] * 2, [8, 1])[1]
    assert math.log(V.snr_gain(shape, keep)) == pytest.approx(0, abs=0.02)
    assert math.log(V.snr_gain(shape, lambda x: frames(x).mean(1))) == pytest.approx(math.log(8), abs=0.05)
    assert math.log(V.snr_gain(shape, lambda x: F.avg_pool2d(x, 2))) == pytest.approx(2 * math.log(2), abs=0.02)


def test_the_schedule_knows_a_frames_size_and_no_number_of_frames():
    """Kills: the side of all frames together; a shift of the level of time."""
    t = torch.linspace(0, 1, 11)
    config = tiny("8:8:1", size=(32, 32), outer_channels="8,8/8", outer_blocks="1,1/1")
    assert config.shapes == [(24, 32, 32), (24, 16, 16), (3, 16, 16)]
    high, middle, low = C.make_schedules(config)
    assert torch.equal(middle(t), low(t))
    assert_close(low(t), S.logsnr_shifted(t, 16, 16))
    assert_close(low(t) - high(t), torch.full_like(t, 2 * math.log(2)), atol=1e-4, rtol=0)


def test_a_gaussian_oracle_draws_frames_with_the_right_covariance():
    """x ~ N(0, C) over the frames of a pixel, and the level below is frame 0: the best denoiser is a matrix, which sees
    both levels. Kills: frames that share their noise or their steps' noise; a level that is drawn apart from the other.
    """
    frames, C_ = 4, 0.25 * 0.8 ** (torch.arange(4)[:, None] - torch.arange(4)).abs().double()
    both = torch.cat([C_, C_[:1]])                                        # the frames, and frame 0 once more
    both = torch.cat([both, both[:, :1]], 1)                              # (5, 5)
    tokens = lambda z: torch.cat([z[0].unflatten(1, (frames, 3)), z[1][:, None]], 1).flatten(2).double()

    def oracle(z, logsnr, cond):
        alpha, sigma = S.alpha_sigma(logsnr[0].double())
        x = alpha * both @ torch.linalg.inv(alpha ** 2 * both + sigma ** 2 * torch.eye(5)) @ tokens(z)
        v = ((alpha * tokens(z) - x) / sigma).float()                     # (B, 5, 3 H W)
        return [v[:, :frames].reshape(z[0].shape), v[:, frames:].reshape(z[1].shape)]

    for sampler in ("ddim", "ddpm"):
        drawn = tokens(P.sample_levels(oracle, [S.logsnr_cosine] * 2, {}, [(3 * frames, 16, 16), (3, 16, 16)], range(8),
                                       steps=128, sampler=sampler, noise_param=0.5, clip="none"))
        assert_close(torch.einsum("bsn,btn->st", drawn, drawn) / drawn[:, 0].numel(), both, atol=0.02, rtol=0)


# ---- the network

@pytest.mark.parametrize("make", [small_unet, small_uvit, lambda: nest(small_uvit())])
def test_at_first_a_video_model_is_t_image_models_to_the_bit(make):
    """Kills: attention over time that does not start at zero; conditions or log-SNR of another video; frames mixed."""
    image, logsnr = stir(make()).eval(), torch.tensor([-1.0, 2.0])
    nested, each = isinstance(image, N.NestedUNet), lambda a: a.repeat_interleave(4)
    counts = [4] * (1 + nested)
    video = V.Video(V.attend_over_time(copy.deepcopy(image), counts, 2), counts).eval()
    z = noises([(32, 32), (16, 16)][1 - nested:], 2 * 4)                  # one a frame
    call = lambda model, z, logsnr, cond: (model(z, [logsnr] * 2, cond) if nested else [model(z[0], logsnr, cond)])
    with torch.no_grad():
        v = call(video, [V.to_videos(level, 4) for level in z], logsnr, LABEL)
        wanted = call(image, z, each(logsnr), {"label": each(LABEL["label"])})
    assert all(torch.equal(V.to_frames(level, 4), w) for level, w in zip(v, wanted))


@pytest.mark.parametrize("config", [tiny("1:1", size=(32, 32), outer_channels="8,8", outer_blocks="1,1"),
                                    tiny("1", outer_channels="", outer_blocks="")])
def test_one_frame_is_the_image_model_to_the_bit(config):
    """Loss, gradients and samples. Kills: a layer of time that one frame meets; other random numbers."""
    results = []
    for c in (config, C.replace(config, frames="")):
        torch.manual_seed(0)
        model = C.build_model(c)
        x = torch.rand(2, *c.shapes[0], generator=torch.Generator().manual_seed(1)) * 2 - 1
        t, eps, _ = T.draw(0, 0, range(2), T.noise_shapes(c), torch.device("cpu"))
        loss = T.training_loss(c, opened(model), x, LABEL, t, eps)
        loss.backward()
        images = P.sample_run(model.eval(), C.replace(c, sample_steps=3), LABEL, [1, 2], torch.device("cpu"), "float32")
        results.append([loss, images, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 20 and all(map(torch.equal, *results))


def seen_by(model, config, frame):
    """Return which frames of z, and whether the level below, change F of one frame."""
    z = [level.requires_grad_() for level in videos(config)]
    v = model.network(z, [torch.zeros(2)] * 2, LABEL)
    high, low = torch.autograd.grad(frame_of(v[0], frame).square().sum(), z, allow_unused=True)
    return [bool(frame_of(high, i).any()) for i in range(config.counts[0])], low is not None and bool(low.any())


def test_frames_and_levels_see_each_other_after_two_steps_and_not_before():
    """The level of one frame tells all others what the letter is. Kills: adapters or attention that never open; a kept
    frame that reaches frame 0 alone."""
    config = tiny()
    torch.manual_seed(0)
    model = C.build_model(config)
    for frame in range(4):
        assert seen_by(model, config, frame) == ([i == frame for i in range(4)], False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t, eps = videos(config)[0], torch.tensor([0.3, 0.7]), videos(config, seed=1)
    for _ in range(2):                                                    # what lies behind a zero learns a step later
        T.training_loss(config, model, x, LABEL, t, eps).backward()
        optimizer.step()
        optimizer.zero_grad()
    for frame in range(4):
        assert seen_by(model, config, frame) == ([True] * 4, True)


def test_the_mix_takes_each_channel_from_frame_to_frame():
    """Kills: a mix of each frame with itself; from and to exchanged; another channel's."""
    layer, x = V.OverTime(torch.nn.Identity(), 8, 2, 3), torch.randn(2, 3, 8, 4, 4)
    want = x.clone()
    want[:, 2, 5] += x[:, 0, 5]
    with torch.no_grad():
        layer.mix[0, 2, 5] = 1
        torch.testing.assert_close(layer(x.flatten(0, 1)), want.flatten(0, 1))


def test_reversing_the_frames_changes_more_than_their_order():
    """Kills: no mix, no attention, no position of time. Without position, mix, or a level of time, reversed frames give
    reversed frames."""
    config = tiny("4:4", size=(32, 32), outer_channels="8,8", outer_blocks="1,1")
    model, z = opened(C.build_model(config)).eval(), videos(config)
    turn = lambda level: V.to_videos(level.unflatten(1, (4, 3)).flip(1).flatten(0, 1), 4)
    both = lambda: (model(list(map(turn, z)), [torch.zeros(2)] * 2, LABEL), model(z, [torch.zeros(2)] * 2, LABEL))
    with torch.no_grad():
        for kind, name in ((None, ""), (V.OverTime, "mix"), (V.TimePosition, "position")):
            for module in model.modules():
                if kind and isinstance(module, kind):
                    getattr(module, name).zero_()
            for a, b in zip(*both()):
                difference = (a - turn(b)).abs().max()
                assert difference < 1e-5 if name == "position" else difference > 1e-3, name


def test_a_kept_frame_is_heard_by_the_frames_that_it_stands_for():
    """With attention over time still closed. Kills: kept frames repeated in turns; a kept frame of another video."""
    model, z = C.build_model(tiny("4:2")), videos(tiny("4:2"))
    for name, p in model.named_parameters():
        if "adapter" in name:
            torch.nn.init.normal_(p)
    z[1].requires_grad_()
    v = model.network(z, [torch.zeros(2)] * 2, LABEL)[0]
    for frame in range(4):
        seen, = torch.autograd.grad(frame_of(v[1:], frame).square().sum(), z[1], retain_graph=True)
        assert [bool(frame_of(seen[1:], i).any()) for i in range(2)] == [i == frame // 2 for i in range(2)]
        assert not seen[0].any()


@pytest.mark.parametrize("text_encoder", ["", "bytes"])
def test_a_condition_reaches_all_frames_of_its_video_alone(text_encoder):
    """Kills: the caption or class of the first video for all frames; conditions in the order of another fold."""
    config = tiny("4:2", text_encoder=text_encoder, text_channels=8, text_length=3, text_layers=1)
    model, z = opened(C.build_model(config)).eval(), videos(config)

    def draw(a, b):
        cond = {"label": torch.tensor([a, b])}
        if text_encoder:
            cond = {"text": torch.tensor([[a] * 3, [b] * 3]), "text_mask": torch.ones(2, 3, dtype=torch.bool)}
        with torch.no_grad():
            return [v.unflatten(1, (-1, 3)) for v in model(z, [torch.zeros(2)] * 2, cond)]      # (B, T, 3, H, W)
    for one, other in zip(draw(1, 2), draw(1, 3)):
        differ = (one != other).flatten(2).any(2)                         # (B, T)
        assert not differ[0].any() and differ[1].all()


def test_attention_over_time_stays_at_its_position():
    """Kills: attention over positions in place of frames; tokens of another frame's position."""
    layer = opened(V.OverTime(torch.nn.Identity(), 8, 2, 4))
    for shape, at in (((8, 8, 4, 6), lambda h: h[..., 1, 2]), ((8, 24, 8), lambda h: h[:, 8])):
        x = torch.randn(shape, requires_grad=True)
        seen = torch.autograd.grad(at(layer(x))[:4].square().sum(), x)[0]                       # of the first video
        assert at(seen)[:4].flatten(1).any(1).all() and not at(seen)[4:].any()
        at(seen).zero_()
        assert not seen.any()


PLAIN = dict(outer_channels="", outer_blocks="")
THREE = dict(size=(32, 32), outer_channels="8,8/8", outer_blocks="1,1/1")


@pytest.mark.parametrize("config, lower", [
    (tiny("4:1"), tiny("", **PLAIN)), (tiny("4:2"), tiny("2", **PLAIN)), (tiny("4:4:1", **THREE), tiny("4:1"))])
def test_growing_takes_the_lower_levels_as_they_are(config, lower):
    """An image model, a video model, a nest of both. Kills: weights that a renamed layer loses; an inner level that
    changes its output."""
    small, model = opened(C.build_model(lower), 5).eval(), C.build_model(config).eval()
    N.grow(model, small.state_dict())
    z, call = videos(config), lambda model, z: model(z, [torch.zeros(2)] * len(z), LABEL)
    alone = lambda m: call(m, z[1:]) if lower.is_nested else [m(z[1], torch.zeros(2), LABEL)]
    with torch.no_grad():
        for v in (call(model, z)[1:], alone(model.inner)):
            assert len(v) == len(z) - 1 and all(map(torch.equal, v, alone(small)))


# ---- the scenes

def test_a_moving_scene_begins_as_the_scene_and_moves_evenly():
    """A function of (seed, index, frame). Kills: motion that depends on the number of frames, or jumps."""
    still = Glyphs((32, 32))
    four, eight = (in_motion(still, frames) for frames in (4, 8))
    for i in (3, 50):
        assert torch.equal(eight.image(i)[:12], four.image(i)) and torch.equal(four.image(i)[:3], still.image(i))
        scenes = [still.scene(i) | eight.motion(i, frame) for frame in range(8)]
        for key in ("angle", "x", "y", "letter_rgb"):
            steps = np.diff([scene[key] for scene in scenes], axis=0)
            assert np.allclose(steps, steps[0]) and np.abs(steps).max() > 1e-4
        turn = abs(math.degrees(scenes[1]["angle"] - scenes[0]["angle"]))
        assert 3 <= turn <= 6 and all(np.array_equal(s["ground_rgb"], scenes[0]["ground_rgb"]) for s in scenes)
    assert four.label(3) == still.label(3) and four.caption(3) == still.caption(3)


def test_a_letter_can_be_read_in_each_frame():
    """Kills: a letter that takes the brightness of its ground on the way."""
    from data import luminance
    scenes = in_motion(Glyphs(), 16)
    for i in range(300):
        for frame in (0, 7, 15):
            s = scenes.scene(i) | scenes.motion(i, frame)
            assert abs(luminance(s["letter_rgb"]) - luminance(s["ground_rgb"])) > 0.2


# ---- the page

def test_the_page_says_what_shifts(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [line.split() for line in page("video.py", capsys).splitlines()[1:4]]
    assert [float(row[-2]) for row in rows] == pytest.approx([0, math.log(8), 2 * math.log(2)], abs=0.05)
    assert float(rows[1][-1]) < float(rows[2][-1]) < 1                    # averaging frames loses more than pixels
    assert (tmp_path / "figures" / "video.png").exists()
