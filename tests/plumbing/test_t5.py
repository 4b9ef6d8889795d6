"""A frozen T5 and the cache of its embeddings. Most of these tests need the package transformers."""
import shutil
import sys

import pytest
import torch
from PIL import Image

import config as C
import sample as P
import train as T
from plumbing import UserError, t5
from plumbing.settings import override
from programs import TINY, program_here, run_here
from test_text import settings
from text import to_bytes

T5_ARGS = ["--text-channels", 16, "--text-length", 12]


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    """Save a T5 of 5,000 weights, with a vocabulary of its own, as a real one is saved."""
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    folder = str(tmp_path_factory.mktemp("models") / "t5")
    words = [("▁" + word, -1.0) for word in ("a", "red", "blue", "cat", "on")]
    letters = [("▁", -2.0)] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + words + letters,
                                         extra_ids=0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(
        d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


def captioned_folder(folder):
    folder.mkdir()
    captions = ["a red cat", "a blue cat", "", "a cat on a red cat on a blue cat on a cat on a cat", "red"]
    for i, caption in enumerate(captions):
        Image.new("RGB", (16, 16), (40 * i, 90, 255 - 40 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return captions


def test_t5_reads_and_is_frozen_and_padding_does_not_matter(tiny_t5):
    encoder = t5.FrozenT5(tiny_t5, 12, torch.device("cpu"))
    text, mask = encoder(["a red cat", "", "red a cat"])
    assert text.dtype == torch.bfloat16 and text.shape == (3, 12, 16)
    assert mask.sum(1).tolist() == [4, 0, 4] and not text[~mask].any()    # three words and the end of the sentence
    assert not torch.equal(text[0], text[2]) and not text.requires_grad
    alone, _ = encoder(["a red cat"])
    assert torch.equal(alone[0], text[0])
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training
    assert t5.FrozenT5(tiny_t5, 12, torch.device("cpu")) is encoder        # loaded once


def test_cached_and_live_embeddings_agree(tiny_t5, tmp_path, monkeypatch):
    captions = captioned_folder(tmp_path / "photos")
    data = str(tmp_path / "photos")
    command = ["--data", data, "--text-encoder", tiny_t5, "--text-length", 12, "--device", "cpu"]
    assert run_here(t5, command) == (None, "")
    config = settings(text_encoder=tiny_t5, text_channels=16, text_length=12, data=data)
    live, cached = t5.Encoder(config, "cpu"), t5.Encoder(config, "cpu", cached=True)
    assert isinstance(cached.encode, t5.Cache)
    for key, value in live(captions).items():
        assert torch.equal(value, cached(captions)[key]), key
    monkeypatch.setattr(t5, "FrozenT5", None)                              # with a cache nobody needs it
    assert t5.Encoder(config, "cpu", cached=True)(["red"])["text_mask"].sum() == 2
    with pytest.raises(UserError, match="no embedding of 'green' in .*: run python -m plumbing.t5 again"):
        cached(["green"])
    with pytest.raises(UserError, match="--text-length 10: .* was made with 12"):
        t5.Encoder(override(config, text_length=10), "cpu", cached=True)
    monkeypatch.undo()
    (tmp_path / "photos" / "4.txt").write_text("blue")                    # a new caption fails before any work
    with pytest.raises(UserError, match="no embedding of 'blue'"):
        t5.Encoder(config, "cpu", cached=True).check(t5.open_source(data, (16, 16)))
    assert t5.write_cache(data, tiny_t5, 12, torch.device("cpu"))[1] == 1  # only this one is added
    assert t5.Encoder(config, "cpu", cached=True)(["blue", "red"])["text_mask"].sum() == 4


class Hash:
    """Stands in for a T5: a caption's embedding comes from its bytes."""
    channels, length = 4, 12

    def cuts(self, caption):
        return len(caption.encode()) > self.length

    def __call__(self, captions):
        text, mask = to_bytes(captions, 12)
        return (text[:, :, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])).bfloat16(), mask


def test_an_interrupted_cache_goes_on_and_a_damaged_one_is_one_line(tmp_path, monkeypatch):
    """Kills: half a part taken for a whole one; embeddings lost or computed twice."""
    monkeypatch.setattr(t5, "FrozenT5", lambda *args: Hash())
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "a.png")
    captions = [f"caption {i}" for i in range(10)]
    monkeypatch.setattr(t5, "open_source", lambda *args: type("Source", (), {
        "__len__": lambda self: len(captions), "captions": lambda self, i: (captions[i],)})())
    monkeypatch.setattr(Hash, "calls", 0, raising=False)

    class Killed(Exception):
        pass

    def killed_in_the_third_part(self, some):
        Hash.calls += 1
        if Hash.calls == 3:
            raise Killed
        return whole(self, some)
    whole = Hash.__call__
    monkeypatch.setattr(Hash, "__call__", killed_in_the_third_part)
    data, write = str(tmp_path / "photos"), lambda: t5.write_cache(str(tmp_path / "photos"), "t5", 12, "cpu", part=4)
    with pytest.raises(Killed):
        write()
    folder = t5.cache_folder(data, "t5")
    (tmp_path / "photos" / ".text" / "t5" / "000002.npy").write_bytes(b"half")                  # what a kill leaves
    (tmp_path / "photos" / ".text" / "t5" / "000002.index.new").write_bytes(b"half")
    assert write() == (folder, 2)                                         # eight were written before
    cache = t5.Cache(folder, 12)
    assert all(torch.equal(a, b) for a, b in zip(cache(captions + [""]), Hash.__call__(Hash(), captions + [""])))
    for damage in (b"", b"[]", b"{"):
        (tmp_path / "photos" / ".text" / "t5" / "about.json").write_bytes(damage)
        with pytest.raises(UserError, match="damaged"):
            t5.Cache(folder, 12)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(t5, "FrozenT5", None)                              # it fails before the T5 is loaded
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / ".text").write_text("in the way")
    status, error = run_here(t5, ["--data", tmp_path, "--text-encoder", "t5"])
    assert status == 2 and error.count("\n") == 1 and "Not a directory" in error


def test_a_t5_that_lacks_weights_is_refused(tiny_t5, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "block.1" not in key}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match="it lacks weights"):
        t5.FrozenT5(str(folder), 12, torch.device("cpu"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_with_t5_keeps_its_weights_out_of_the_checkpoint(tiny_t5, tmp_path, cached):
    captioned_folder(tmp_path / "photos")
    if cached:
        t5.write_cache(str(tmp_path / "photos"), tiny_t5, 12, torch.device("cpu"))
    args = [*TINY, "--text-encoder", tiny_t5, *T5_ARGS, "--data", tmp_path / "photos", "--steps", 2]
    frozen = t5.FrozenT5(tiny_t5, 12, torch.device("cpu")).model           # the program uses this one, too
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    assert run_here(T, [*args, "--out", tmp_path / "r"]) == (None, "")
    assert t5.FrozenT5(tiny_t5, 12, torch.device("cpu")).model is frozen
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert all(p.grad is None for p in frozen.parameters())
    state = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    with torch.device("meta"):
        count = len(list(C.build_model(override(C.Config(), **{
            k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()})).parameters()))
    assert not any("encoder" in key for key in [*state["model"], *state["ema"]])
    assert len(state["optimizer"]["state"]) == count
    draw = ["--text", "a blue cat", "--n", 1, "--out", tmp_path / "a.png"]
    assert run_here(P, [tmp_path / "r", *draw]) == (None, "")
    moved = shutil.copytree(tiny_t5, tmp_path / "elsewhere")              # say where the T5 is now
    assert run_here(P, [tmp_path / "r", "--text-encoder", moved, *draw]) == (None, "")
    assert run_here(T, ["--resume", tmp_path / "r", "--steps", 3, "--text-encoder", moved]) == (None, "")
    status, error = run_here(P, [tmp_path / "r", "--text-encoder", "", *draw])
    assert status == 2 and "--text-encoder (empty): " in error


def test_another_width_than_the_encoder_has_is_one_line(tiny_t5, tmp_path):
    captioned_folder(tmp_path / "photos")
    status, error = run_here(T, [*TINY, "--text-encoder", tiny_t5, "--text-channels", 32, "--data",
                                 tmp_path / "photos", "--out", tmp_path / "r"])
    assert status == 2 and error.count("\n") == 1 and "--text-channels 32: " in error and "has 16" in error


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    t5.FrozenT5.cache_clear()
    status, error = run_here(T, ["--preset", "t2i256_uvit", "--base-channels", 8, "--emb-channels", 16, "--data",
                                 "glyphs", "--steps", 1, "--out", tmp_path / "r"])
    assert status == 2 and error.count("\n") == 1
    assert "--text-encoder google/t5-v1_1-xxl: needs the package transformers: pip install transformers" in error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("args, message", [
    ([], "required: --data"),
    (["--data", "."], "no image"),
    (["--data", ".", "--text-encoder", "bytes"], "is trained with the model"),
    (["--data", ".", "--text-length", "0"], "--text-length 0"),
])
def test_what_the_cache_refuses(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    status, error = run_here(t5, args)
    assert status == 2 and error.count("\n") == 1 and message in error, error


def test_a_folder_without_captions_has_nothing_to_cache(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    status, error = run_here(t5, ["--data", tmp_path, "--text-encoder", "any"])
    assert status == 2 and "no image has a caption" in error


def test_it_runs_as_a_module(tmp_path):
    """Kills: a program that only works when imported."""
    done = program_here("plumbing.t5", "--data", tmp_path / "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "want a folder of images" in done.stderr
    done = program_here("plumbing.t5", "-h")
    assert done.returncode == 0 and "--text-encoder" in done.stdout
