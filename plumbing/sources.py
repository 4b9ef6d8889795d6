"""The data of a run: opened, found again in their old place or in another, and still the same or changed."""
import dataclasses
import os

from data import FontFile, Glyphs, ImageFolder
from plumbing import UserError
from plumbing.files import fingerprint
from plumbing.fonts import find_font, matplotlib_fonts
from plumbing.motion import in_motion

LOOKED_INTO = 64                                                          # files of a folder whose contents count


def open_source(data, size, portrait=False, characters="", **scenes):
    """Open what --data names: "glyphs", a font file, or a folder of images. scenes: of Glyphs. Raises UserError."""
    if data == "glyphs":
        return Glyphs(size, portrait=portrait, characters=characters, **scenes)
    path = find_font(data)
    if os.path.isfile(path):
        if not data.lower().endswith((".ttf", ".otf", ".ttc", ".otc")):
            raise UserError(f"--data {data}: want glyphs, a font file (.ttf, .otf, .ttc) or a folder of images")
        return FontFile(path, size, characters, portrait=portrait, **scenes)
    if characters:
        raise UserError(f"--characters: want a font file, or glyphs, not --data {data}")
    if os.path.isdir(data):
        return ImageFolder(data, size, portrait)
    fonts = ", ".join(sorted(os.listdir(matplotlib_fonts()))[:4])
    raise UserError(f"--data {data}: no such file or folder, and no font of matplotlib (which has {fonts}, ...)")


def check_unseen(data, held_out):
    """Check that the folder --held-out shares no images with --data. Raises UserError."""
    seen, unseen = os.path.realpath(data), os.path.realpath(held_out)
    if os.path.commonpath([seen, unseen]) in (seen, unseen):
        raise UserError(f"--held-out {held_out}: it shares images with --data {data}")


def open_run(config, **options):
    """Open the source that a run with this Config learns from. options: of open_source; they replace the Config's."""
    options = dict(pairs="seen" if config.withhold else "all", portrait=config.portrait,
                   characters=config.characters) | options
    source = open_source(config.data, config.size, count=config.scenes, seed=config.seed, **options)
    if config.counts[0] > 1 and not isinstance(source, Glyphs):
        raise UserError(f"--frames: only drawn scenes move, not --data {config.data}")
    return in_motion(source, config.counts[0])


def add_accept_flag(parser):
    parser.add_argument("--accept-changed-data", action="store_true", help="go on although the data are no longer "
                        "those that the run began with")


def located(config, args, run):
    """Return the config of an old run with its data where they are now: --data says so if they moved.

    A run that accepts changed data forgets what they were. Raises UserError.
    """
    moved_to = getattr(args, "data", None)
    if moved_to is None and config.data not in ("", "glyphs") and not os.path.exists(find_font(config.data)):
        raise UserError(f"{run}: its data are not in {config.data}, seen from here; say with --data where they are")
    return dataclasses.replace(config, data=moved_to or config.data,
                               data_id="" if args.accept_changed_data else config.data_id)


def same_data(config, source, count=None):
    """Return config with the data_id of this source. Raises UserError if the run began with other data.

    count: the number of examples then, if it is known. Runs from before data_id have nothing else.
    """
    if not config.text_encoder and tuple(source.classes) != config.class_names:
        raise UserError(f"{config.data}: its classes are no longer those of the run; if its data are elsewhere, say "
                        "so with --data")
    if count not in (None, len(source)):
        raise UserError(f"{config.data} had {count:,} examples and now has {len(source):,}; their order would change; "
                        "--accept-changed-data goes on with those of now")
    now = data_id(source, bool(config.text_encoder))
    check_unchanged(config, now)
    return dataclasses.replace(config, data_id=now)


def check_unchanged(config, now):
    """Raise UserError if data with the data_id `now` are not those of this Config."""
    if config.data_id not in ("", now):                                   # empty: unknown, or changes are accepted
        raise UserError(f"{config.data}: the names, sizes or contents of the data are no longer those that the run "
                        "began with; --accept-changed-data goes on with those of now")


def data_id(source, captions=False):
    """Return a short name for what a source holds, wherever it is. captions: their files count, too.

    Of a folder of images: the names and sizes of all files, and how some of them begin. To read every file would take
    longer than to start.
    """
    if isinstance(source, FontFile):
        return fingerprint(glimpse(source.fonts[0][0]))
    if not isinstance(source, ImageFolder):
        return "glyphs"                                                   # the settings say the rest
    some = source.files[::-(-len(source) // LOOKED_INTO)]
    names = [os.path.relpath(file, source.path).replace(os.sep, "/") for file in source.files]
    sizes = [os.path.getsize(file) if os.path.isfile(file) else None for file in source.files]
    if captions:
        some = [os.path.join(source.path, "captions.jsonl"), *some, *(os.path.splitext(f)[0] + ".txt" for f in some)]
    return fingerprint(names, sizes, *map(glimpse, some))


def glimpse(path):
    """Return the size of a file and its first bytes; None if there is no file that can be read."""
    try:
        if not os.path.isfile(path):                                      # a pipe would block
            return None
        with open(path, "rb") as file:
            return os.path.getsize(path), file.read(1 << 16)
    except OSError:
        return None
