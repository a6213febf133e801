"""Every kind of picture that people have: what comes out, what is left out and why, and how sets are made of them."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from steerclear.errors import InvalidInput
from steerclear.negation import NegationSet, Space, encoder, encoder_of, find_images
from steerclear.negation import images as module

SIZE = (8, 12)  # height, width


class Linear:
    """A linear encoder: each latent is a fixed matrix times the pixels, so every expected value is one product."""

    space = Space(encoder="sha256:linear", shape=(2, 3), name="a linear map")
    size = SIZE

    def __init__(self, **asked):
        self.asked = asked
        self.matrix = torch.randn(6, 3 * 8 * 12, generator=torch.Generator().manual_seed(3))
        self.batches = []

    def encode(self, images):
        assert images.shape[1:] == (3, *SIZE)
        assert images.dtype == torch.float32
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1
        self.batches.append(len(images))
        return (images.flatten(1) @ self.matrix.T).unflatten(1, (2, 3))

    def decode(self, latents):
        return (latents.flatten(1) @ self.matrix).unflatten(1, (3, *SIZE)).clamp(0, 1)


def picture(value=0, size=(12, 8), mode="RGB"):
    return Image.new(mode, size, (value,) * len(mode) if len(mode) > 1 else value)


def noise(seed, size=(12, 8)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def one(source, size=SIZE):
    """The only picture's tensor, or the reason why there is none."""
    skipped = []
    found = list(module.pictures([source], size, skipped))
    return found[0].image if found else skipped[0].reason


def encode(images, **options):
    return NegationSet.encode(images, Linear(), progress=False, **options)


# -- what a picture becomes -----------------------------------------------------------------------------------------


def test_a_picture_of_the_right_size_is_its_pixels():
    image = noise(0)
    expected = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(one(image), expected)


def test_alpha_is_flattened_on_white():
    assert one(Image.new("RGBA", (12, 8), (0, 0, 0, 0))).unique().tolist() == [1.0]
    half = one(Image.new("RGBA", (12, 8), (255, 0, 0, 51)))  # 51/255 = 0.2 red on white: 1, 0.8, 0.8
    torch.testing.assert_close(half[:, 0, 0], torch.tensor([1.0, 0.8, 0.8]), atol=1 / 255, rtol=0)
    assert one(Image.new("LA", (12, 8), (0, 0))).unique().tolist() == [1.0]
    palette = Image.new("P", (12, 8), 0)
    palette.putpalette([9, 9, 9])
    palette.info["transparency"] = 0
    assert one(palette).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (12, 8), 51), 0.2),
        (Image.new("1", (12, 8), 1), 1.0),
        (Image.new("CMYK", (12, 8), (0, 0, 0, 204)), 0.2),
        (Image.new("YCbCr", (12, 8), (51, 128, 128)), 0.2),
        (Image.new("HSV", (12, 8), (0, 0, 51)), 0.2),
        (Image.fromarray(np.full((8, 12), 13107, np.uint16)), 0.2),
        (Image.fromarray(np.full((8, 12), 13107, np.int32)), 0.2),
        (Image.fromarray(np.full((8, 12), 51, np.int32)), 0.2),
        (Image.fromarray(np.full((8, 12), 0.2, np.float32)), 0.2),
        (Image.fromarray(np.full((8, 12), 51.0, np.float32)), 0.2),
    ],
    ids=["L", "1", "CMYK", "YCbCr", "HSV", "I;16", "I", "I with 8 bits", "F", "F with 8 bits"],
)
def test_any_mode_becomes_rgb(image, expected):
    values = one(image)
    assert values.shape == (3, *SIZE)
    torch.testing.assert_close(values, torch.full_like(values, expected), atol=1.5 / 255, rtol=0)


def test_pictures_are_turned_upright(tmp_path):
    upright = noise(1)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90° clockwise to show"
    stored.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(one(tmp_path / "a.png"), one(upright))


def test_the_first_frame_of_an_animated_file_counts(tmp_path):
    frames = [picture(0), picture(255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert one(tmp_path / "a.gif").unique().tolist() == [0.0]


def test_the_aspect_is_kept_by_cropping_about_the_centre():
    wide = np.zeros((8, 36, 3), np.uint8)
    wide[:, 12:24] = np.asarray(noise(2))
    assert torch.equal(one(Image.fromarray(wide)), one(noise(2)))


def test_larger_pictures_are_averaged_not_sampled():
    checkers = np.indices((80, 120)).sum(0) % 2 * 255
    values = one(Image.fromarray(checkers.astype(np.uint8)))
    torch.testing.assert_close(values, torch.full_like(values, 0.5), atol=0.05, rtol=0)


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: (t * 255).round().to(torch.uint8), lambda t: t.half()])
def test_tensors_are_pictures_too(convert):
    expected = one(noise(4))
    assert torch.equal(one(convert(expected)), expected)


def test_tensors_may_be_grey_or_have_alpha():
    assert one(torch.full((1, 8, 12), 0.2)).unique().tolist() == [pytest.approx(0.2)]
    assert one(torch.zeros(4, 8, 12)).unique().tolist() == [1.0]


def test_the_callers_picture_is_not_changed():
    image = Image.new("RGBA", (30, 20), (1, 2, 3, 4))
    before = image.copy()
    one(image)
    assert image.mode == "RGBA"
    assert image.tobytes() == before.tobytes()


# -- what is left out -----------------------------------------------------------------------------------------------


def png(width, height):
    """A PNG file that declares a size and has almost no data: a decompression bomb's header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def saved(image, kind):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


BAD_FILES = {
    "empty": (b"", "a file of 0 bytes"),
    "text": (b"not a picture at all", "not a picture in a known format"),
    "html": (b"<html><img src=x></html>" * 50, "not a picture"),
    "cut png": (saved(noise(5, (64, 64)), "PNG")[:3000], "corrupt"),
    "cut jpeg": (saved(noise(5, (64, 64)), "JPEG")[:900], "corrupt"),
    "cut gif": (saved(noise(5, (64, 64)), "GIF")[:900], "corrupt"),
    "broken png": (saved(noise(5), "PNG").replace(b"IDAT", b"IDAX"), ("corrupt", "not a picture")),
    "only a head": (saved(noise(5), "PNG")[:20], ("corrupt", "not a picture")),
    "lying png": (png(64, 64), "corrupt"),
    "bomb": (png(60_000, 60_000), "more than 64,000,000 pixels"),
    "big": (png(9_000, 9_000), "9000×9000 pixels (at most 64,000,000 in all)"),
    "warned about": (png(10_000, 10_000), "10000×10000 pixels"),
    "tiny": (saved(picture(size=(7, 100)), "PNG"), "7×100 pixels (at least 8 a side)"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_skipped_with_a_reason_and_no_warning(tmp_path, kind):
    content, reason = BAD_FILES[kind]
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = one(path)
    assert isinstance(got, str)
    assert got.startswith(reason)


def test_a_file_that_is_too_large_is_not_opened(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(module.MAX_BYTES + 1)  # sparse: takes no space
    assert one(tmp_path / "a.png").startswith("a file of 268435457 bytes")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (torch.full((3, 8, 12), float("nan")), "values outside [0, 1], or NaN"),
        (torch.full((3, 8, 12), 1.01), "values outside"),
        (torch.full((3, 8, 12), -1.0), "values outside"),
        (torch.zeros(2, 8, 12), "a tensor of shape (2, 8, 12) (expected"),
        (torch.zeros(8, 12), "a tensor of shape (8, 12) (expected"),
        (torch.zeros(3, 8, 0), "0×8 pixels"),
        (torch.zeros(()).expand(3, 10_000, 10_000), "10000×10000 pixels (at most"),
        (Image.fromarray(np.full((8, 12), np.nan, np.float32)), "grey values outside"),
        (Image.fromarray(np.full((8, 12), -3, np.int32)), "grey values outside"),
        (Image.fromarray(np.full((8, 12), 1e6, np.float32)), "grey values outside"),
        ("nowhere.png", "missing"),
        (".", "a folder or device"),
        (np.zeros((8, 12, 3)), "ndarray, not a path, PIL image or tensor"),
        (None, "NoneType, not a path"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_bad_values_are_skipped_with_a_reason(source, reason):
    got = one(source)
    assert isinstance(got, str)
    assert got.startswith(reason)


def test_the_same_picture_twice_counts_once(tmp_path):
    noise(6).save(tmp_path / "a.png")
    noise(6).save(tmp_path / "b.bmp")
    noise(7).save(tmp_path / "c.png")
    items = encode(tmp_path)
    assert items.ids == ("a.png", "c.png")
    assert [(s.source, s.reason) for s in items.skipped] == [
        (str(tmp_path / "b.bmp"), f"the same picture as {tmp_path / 'a.png'}")
    ]


# -- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "pictures"
    for index, name in enumerate(["weapons/z.png", "weapons/a.png", "drinks/wine.webp", "top.jpg"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(10 + index).save(path)
    (root / "weapons" / "notes.txt").write_text("about these")
    (root / ".hidden.png").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / ".git" / "a.png").write_bytes(b"x")
    return root


def test_a_folder_is_read_in_order_with_its_subfolders(folder):
    items = encode(folder)
    assert items.ids == ("drinks/wine.webp", "top.jpg", "weapons/a.png", "weapons/z.png")
    assert items.labels == ("drinks", "pictures", "weapons", "weapons")
    assert [s.reason for s in items.skipped] == ["not a picture in a known format"]
    assert encode(str(folder)).digests == items.digests


def test_recursion_is_optional(folder):
    assert [p.name for p in find_images(folder, recursive=False)] == ["top.jpg"]
    assert encode(find_images(folder, recursive=False)).ids == ("top.jpg",)


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    noise(30).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.png").symlink_to(tmp_path / "nothing.png")
    names = [p.name for p in find_images(folder)]
    assert "secret.png" not in names
    assert "link.png" not in names
    assert "dangling.png" not in names


def test_folders_without_pictures_are_refused(tmp_path):
    with pytest.raises(InvalidInput, match="without any file; check the path"):
        encode(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InvalidInput, match=r"one usable picture among 1, got none \(notes.txt: not a picture"):
        encode(tmp_path)
    with pytest.raises(InvalidInput, match="which is missing"):
        encode(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match="which is a file"):
        find_images(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "got an empty list"),
        (torch.zeros(0, 3, 8, 12), "got an empty list"),
        (torch.zeros(8, 12), r"got a tensor of shape \(8, 12\)"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_what_holds_no_pictures_is_refused(images, message):
    with pytest.raises(InvalidInput, match=message):
        encode(images)


# -- sets of pictures -----------------------------------------------------------------------------------------------


def test_latents_are_the_encoders_in_order_and_in_batches():
    linear, images = Linear(), [noise(i) for i in range(19)]
    items = NegationSet.encode(images, linear, progress=False)
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1).float() / 255 for i in images])
    torch.testing.assert_close(items.latents.flatten(1), pixels.flatten(1) @ linear.matrix.T)
    assert max(linear.batches) < 19
    assert sum(linear.batches) == 19
    assert items.space == linear.space
    assert all(
        name == digest.removeprefix("sha256:")[:16] for name, digest in zip(items.ids, items.digests, strict=True)
    )


def test_one_tensor_or_one_file_is_enough(tmp_path):
    batch = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert len(encode(batch)) == 3
    assert len(encode(batch[0])) == 1
    assert len(encode(noise(1))) == 1
    noise(1).save(tmp_path / "a.png")
    assert encode(tmp_path / "a.png").ids == ("a.png",)


def test_labels_and_ids_stay_with_their_pictures_when_others_are_skipped():
    images = [noise(1), "missing.png", noise(2), noise(1), noise(3)]
    items = encode(images, labels=list("abcde"), ids=list("vwxyz"))
    assert items.labels == ("a", "c", "e")
    assert items.ids == ("v", "x", "z")
    assert [s.source for s in items.skipped] == ["missing.png", "picture 3"]
    assert encode(images, labels="daggers").labels == ("daggers",) * 3


def test_labels_and_ids_must_match_the_pictures():
    with pytest.raises(InvalidInput, match="expected 2 labels, one per picture, got 1"):
        encode([noise(1), noise(2)], labels=["a"])
    with pytest.raises(InvalidInput, match="expected 2 ids, one per picture, got 3"):
        encode([noise(1), noise(2)], ids=["a", "b", "c"])
    with pytest.raises(InvalidInput, match="unique"):
        encode([noise(1), noise(2)], ids=["a", "a"])


def test_files_of_the_same_name_get_different_ids(tmp_path):
    paths = [tmp_path / f"{i}" / "a.png" for i in range(3)]
    for index, path in enumerate(paths):
        path.parent.mkdir()
        noise(index).save(path)
    assert encode(paths).ids == ("a.png", "a.png (2)", "a.png (3)")


def test_an_encoder_that_contradicts_its_space_is_refused():
    wrong = Linear()
    wrong.space = Space(encoder="sha256:linear", shape=(3, 2))
    with pytest.raises(InvalidInput, match=r"shape \(1, 3, 2\) from the encoder, got \(1, 2, 3\)"):
        NegationSet.encode([noise(0)], wrong, progress=False)


def test_pictures_can_be_added_to_a_set():
    items = encode([noise(1), noise(2)])
    more = items.add([noise(2), noise(3)], Linear(), progress=False, labels="late")
    assert len(more) == 3
    assert more.labels == ("", "", "late")
    assert more.digests == encode([noise(1), noise(2), noise(3)]).digests
    assert [s.reason for s in more.skipped] == ["already in the set"]


def test_progress_is_shown_on_request(capsys):
    encode([noise(1)])
    assert capsys.readouterr().err == ""
    NegationSet.encode([noise(1)], Linear())
    assert "1/1" in capsys.readouterr().err


# -- pipelines ------------------------------------------------------------------------------------------------------


class FakePipe:
    """Draws noise from each generator; blackens what its checker is told to."""

    def __init__(self, flagged=()):
        self.calls, self.flagged, self.drawn = [], set(flagged), 0

    def __call__(self, prompt, generator, output_type, **options):
        self.calls.append((prompt, options))
        assert output_type == "pil"
        values = [(torch.rand(8, 12, 3, generator=g) * 255).byte().numpy() for g in generator]
        flags = [self.drawn + i in self.flagged for i in range(len(prompt))]
        self.drawn += len(prompt)
        pictures = [picture(0) if f else Image.fromarray(v) for f, v in zip(flags, values, strict=True)]
        return SimpleNamespace(images=pictures, nsfw_content_detected=flags if self.flagged else None)


@pytest.fixture
def hook(monkeypatch):
    """The hook with a factory for fake pipelines, taken back after the test."""
    monkeypatch.setattr(encoder, "_factories", [])
    encoder.use(lambda pipe, **size: Linear(**size))


def drawn_with(seed):
    pixels = (torch.rand(8, 12, 3, generator=torch.Generator().manual_seed(seed)) * 255).byte()
    return pixels.permute(2, 0, 1).float() / 255


def test_a_pipeline_becomes_an_encoder_through_the_hook(hook):
    linear = Linear()
    assert encoder_of(linear) is linear
    assert isinstance(encoder_of(FakePipe()), Linear)
    assert len(NegationSet.encode([noise(1)], FakePipe(), progress=False)) == 1


def test_another_size_reaches_the_factory(hook, monkeypatch):
    assert encoder_of(FakePipe()).asked == {}
    assert encoder_of(FakePipe(), height=16).asked == {"height": 16}
    asked = []
    encoder.use(lambda pipe, **size: asked.append(size) or Linear())
    NegationSet.generate(FakePipe(), "a dagger", 1, progress=False, height=16, width=24)
    assert asked == [{"height": 16, "width": 24}]


def test_the_pipeline_encoder_is_loaded_when_it_is_first_needed():
    code = """
import sys, torch
from steerclear.errors import UnsupportedPipeline
from steerclear.negation import NegationSet
assert "diffusers" not in sys.modules
try:
    NegationSet.encode([torch.rand(3, 64, 64)], object(), progress=False)
except UnsupportedPipeline as error:
    print("diffusers" in sys.modules, error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True object: expected")


def test_generate_draws_each_picture_from_its_own_seed(hook):
    pipe = FakePipe()
    items = NegationSet.generate(pipe, ["a dagger", "a bomb"], 5, seed=100, progress=False, num_inference_steps=3)
    expected = torch.stack([drawn_with(100 + k) for k in range(10)])
    torch.testing.assert_close(items.latents.flatten(1), expected.flatten(1) @ Linear().matrix.T)
    assert items.labels == ("a dagger",) * 5 + ("a bomb",) * 5
    assert (items.ids[0], items.ids[9]) == ("a dagger · seed 100", "a bomb · seed 109")
    assert all(options == {"num_inference_steps": 3} for _, options in pipe.calls)


def test_generate_leaves_out_what_a_safety_checker_replaced(hook):
    items = NegationSet.generate(FakePipe(flagged=[1, 2]), "a dagger", 4, progress=False)
    assert items.ids == ("a dagger · seed 0", "a dagger · seed 3")
    assert [s.source for s in items.skipped] == ["'a dagger', seed 1", "'a dagger', seed 2"]
    assert "safety_checker=None" in items.skipped[0].reason
    with pytest.raises(InvalidInput, match="got 2 replaced by the pipeline's safety checker; load"):
        NegationSet.generate(FakePipe(flagged=[0, 1]), "a dagger", 2, progress=False)


def test_generate_refuses_what_makes_no_pictures(hook):
    with pytest.raises(InvalidInput, match="at least one prompt and n >= 1, got 0 prompts and n=2"):
        NegationSet.generate(FakePipe(), [], 2)
    with pytest.raises(InvalidInput, match="got 1 prompts and n=0"):
        NegationSet.generate(FakePipe(), "a dagger", 0)
    with pytest.raises(InvalidInput, match=r"not set here, got \['generator'\]; leave them out"):
        NegationSet.generate(FakePipe(), "a dagger", 1, generator=None)


def test_a_set_of_pictures_survives_the_disk(tmp_path):
    items = encode([noise(1), noise(2)], labels="daggers")
    items.save(tmp_path / "a.safetensors", dtype=torch.float32)
    back = NegationSet.load(tmp_path / "a.safetensors")
    assert torch.equal(back.latents, items.latents)
    assert (back.ids, back.labels, back.digests, back.space) == (items.ids, items.labels, items.digests, items.space)
    assert back.add([noise(2), noise(3)], Linear(), progress=False).ids[:2] == items.ids
