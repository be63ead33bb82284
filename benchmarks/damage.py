"""What becomes of damaged and hostile files: refused in one line, healed, or used without a word?

    python benchmarks/damage.py [before|after] [KIND...]        about half an hour of two cores; docs/damage.md

KIND is run, ledger, model or fuzz. What was tried lies in runs/damage/COMMIT: the same call goes on where it was stopped,
and the page is written when all kinds have come to their end (KIND none: from what is there).

Every file of a run folder, of a ledger and of a model is damaged in every way of `DAMAGES`, and those that are JSON in their
fields, too; then every command that reads the folder is called, in a fork of this process. Besides, entries of a model's
configurations, and its files of weights, are set to what they cannot be. What comes out is compared with what comes out of
the same files undamaged:

    refused     exit code 2 and one line, which names the file or the folder that it lies in
    same        exit code 0 and the same results, from the file as it is or made anew
    told        other results, and a line that names the file
    unseen      other results, and no word of it
    nameless    exit code 2, but no line that names the file
    traceback   exit code 1, or an end by a signal
    hung        no end within a minute

The last four are what must not be.
"""

import contextlib
import gc
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from _record import RESULTS, ROOT, RUNS, SMOKE, commit, record
from whence.cli import main as cli
from whence.data.saving import save_png

IMAGES, QUERIES = 10, 2
EACH, FUZZED = (2, 6) if SMOKE else (14, 1000)
"""Fields that are damaged in a JSON file, and configurations that are fuzzed."""
SECONDS, MEMORY = 60, 6 * 2**30
FAST = Path("/dev/shm")  # where the files are put back a thousand times
CACHES = ("features/", "curvature/", "digests.json", "queries/")  # what lacks there is computed again
BAD = ("unseen", "nameless", "traceback", "hung")


# -------------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Command:
    """words: of it, {} is the folder of the world; results: patterns of the files that come out, besides what it prints."""

    words: str
    results: tuple[str, ...] = ()


PICTURES = "--generate 2 --num_inference_steps 3"
SMALL = "--draws 2 --dim 16"
ATTRIBUTE = f"attribute {{}}/model --train_data_dir {{}}/images {PICTURES}"
LEDGER = "{}/ledger --train_data_dir {}/images"
SCORED = ("run/scores/d_trak/*", "run/report.html", "run/gallery.png")
TRAIN = "train new --train_data_dir {}/images --output_dir {}/model --channels 1 --block_out_channels 16,16"
TRAIN += " --max_train_steps 4 --train_batch_size 4 --checkpointing_steps 2 --lr_warmup_steps 2"
MAKING = (
    TRAIN,
    f"{ATTRIBUTE} --output_dir {{}}/run --method ek_fac --draws 2",
    f"{ATTRIBUTE} --output_dir {{}}/run --method d_trak --reference_data_dir {{}}/references {SMALL}",
    f"{ATTRIBUTE} --output_dir {{}}/run --method pixel_dot",
    "credit {}/run --by creator --method d_trak",
    "ledger plan {}/ledger --model {}/model --train_data_dir {}/images --test 6 --tune 0 --seeds 2 --stack 4",
    f"ledger run {LEDGER}",
    f"ledger measure {LEDGER} --query_data_dir {{}}/run/generated --draws 2",
)
RUN = {
    "attribute": Command(
        f"{ATTRIBUTE} --output_dir {{}}/run --method d_trak --reference_data_dir {{}}/references {SMALL}", SCORED
    ),
    "ek_fac": Command(f"{ATTRIBUTE} --output_dir {{}}/run --method ek_fac --draws 2", ("run/scores/ek_fac/*",)),
    "report": Command("report {}/run", ("run/report.html", "run/gallery.png")),
    "replay": Command("replay {}/run/scores/d_trak"),
    "receipt": Command("replay {}/run/credit/creator"),
    "credit": Command("credit {}/run --by creator --method d_trak", ("run/credit/creator/*",)),
    "contrast": Command("contrast {}/run --this seed0-0000.png --not_that seed0-0001.png"),
    "lds": Command("lds {}/run --ledger {}/ledger --train_data_dir {}/images"),
}
OF_LEDGER = {
    "status": Command(f"ledger status {LEDGER}"),
    "verify": Command(f"ledger verify {LEDGER}"),
    "run": Command(f"ledger run {LEDGER}"),
    "measure": Command(
        f"ledger measure {LEDGER} --query_data_dir {{}}/run/generated --draws 4 --name more",
        ("ledger/measurements/more/*.safetensors",),
    ),
    "lds": Command("lds {}/run --ledger {}/ledger --train_data_dir {}/images"),
}
NEW = f"{ATTRIBUTE} --output_dir {{}}/new --method gradient_dot --draws 1 --dim 4"
OF_MODEL = {
    "doctor": Command("doctor {}/model --train_data_dir {}/images"),
    "attribute": Command(f"{NEW}".replace("/new", "/run"), ("run/scores/gradient_dot/*",)),
    "train": Command(TRAIN, ("model/unet/*",)),
}
FRESH = {"attribute": Command(NEW, ("new/scores/gradient_dot/scores.safetensors", "new/generated/*.png"))}
CHECKED = {"verify": Command("verify {}/run")} if "verify" in cli.VERBS else {}
REPAIRED = (
    {"repair": Command(f"ledger run {LEDGER} --repair", ("ledger/units/*/model.safetensors",))} if CHECKED else {}
)
"""Commands that earlier versions lack."""


@dataclass(frozen=True)
class Done:
    """A command that ended; code: None where it did not."""

    code: int | None
    out: str
    err: str
    results: dict[str, bytes]


SPACE = re.compile(r".* [MG]B (?:are|of) .*\n|.* second.*\n")  # of the disk, memory and time, which the doctor tells


def called(command, world):
    """A command in a fork of this process, with little memory and time."""
    output = [world.with_name(f"{world.name}.{name}") for name in ("out", "err")]
    words = [word.replace("{}", str(world)) for word in command.words.split()]
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for number, path in enumerate(output, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            before = sys.stdout, sys.stderr  # which might close what is 1 and 2 when nobody holds them any longer
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            assert before
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            signal.alarm(SECONDS)
            sys.argv = ["whence", *words]
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = [SPACE.sub("", path.read_text(errors="backslashreplace")) for path in output]
    found = {
        str(path.relative_to(world)): said(path)
        for pattern in command.results
        for path in sorted(world.glob(pattern))
        if path.is_file()
    }
    return Done(None if code == -signal.SIGALRM else code, out, err, found)


def said(path):
    """What a file says: its bytes, or its JSON, however that is written."""
    content = path.read_bytes()
    try:
        return json.dumps(json.loads(content), sort_keys=True) if path.suffix == ".json" else content
    except (ValueError, RecursionError):
        return content


def here(command, world):
    """A command in this process, so that its forks need not import what it needs."""
    out, err, given = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["whence", *(word.replace("{}", str(world)) for word in command.words.split())]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        return Done(int(end.code or 0), out.getvalue(), err.getvalue(), {})
    finally:
        sys.argv = given


def outcome(done, whole, names, doctor=False):
    """What became of it. whole: the same without damage; names: of the file, and of the folder that it lies in; doctor:
    whether the command is to say what it finds, and no more."""
    lines = done.err.splitlines()
    named = any(name in line for line in [*lines, *done.out.splitlines()] for name in names)
    if done.code is None:
        return "hung"
    if done.code not in (0, 2) or not all(line.startswith("whence: ") for line in lines):
        return "traceback"
    if done.code == 2:
        return "refused" if named else "nameless"
    if done.out == whole.out and done.results == whole.results:
        return "same"
    if doctor:  # what it says is what it sees
        return "told"
    told = any(name in line for line in lines for name in names) or (done.out != whole.out and named)
    return "told" if told else "unseen"


# --------------------------------------------------------------------------------------------------------------- damages


def flipped(content, place):
    """One bit."""
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def pipe_instead(path):
    """Whoever opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def linked_to(target):
    """A link in its place."""

    def damage(path):
        path.unlink()
        path.symlink_to(target)

    return damage


def rewritten(change):
    """A damage from what it makes of the bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


SURE = {
    "deleted": Path.unlink,
    "a folder in its place": folder_instead,
    "a bit flipped in the middle": rewritten(lambda content: flipped(content, len(content) // 2)),
    "last bit flipped": rewritten(lambda content: flipped(content, -2)),
}
"""Tried with every command; all others with those that these mattered to, for they read the file."""
DAMAGES = {
    **SURE,
    "emptied": rewritten(lambda content: b""),
    "cut in half": rewritten(lambda content: content[: len(content) // 2]),
    "cut by a byte": rewritten(lambda content: content[:-1]),
    "first bit flipped": rewritten(lambda content: flipped(content, 0)),
    "a bit flipped in the first part": rewritten(lambda content: flipped(content, len(content) // 5)),
    "bytes added": rewritten(lambda content: content + b"\0\0\0more"),
    "another kind of file": rewritten(lambda content: b"\x89PNG\r\n\x1a\n" + content[:100]),
    "a pipe in its place": pipe_instead,
    "a link to what never ends": linked_to("/dev/zero"),
}
OF_TEXT = {
    "not UTF-8": rewritten(lambda content: content[:5] + b"\xff\xfe" + content[5:]),
    "a list": rewritten(lambda content: b"[1, 2, 3]"),
    "null": rewritten(lambda content: b"null"),
    "an empty object": rewritten(lambda content: b"{}"),
    "nested a million deep": rewritten(lambda content: b"[" * 10**6),
    "nested in an object": rewritten(lambda content: b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a huge number": rewritten(lambda content: b'{"format_version": ' + b"9" * 100_000 + b"}"),
}
ODD = (
    None,
    True,
    -1,
    0,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    10**40,
    "../../etc",
    "os.system",
    "",
    [],
    [1, 2],
)
ODD = (*ODD, {}, {"a": 1}, "x" * 100_000, [[1]], "drop")


def places(value, at=()):
    """Where something stands in a JSON value."""
    found = [at] if at else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        found += places(one, (*at, key))
    return found


def set_field(path, at, odd):
    """Another value in a JSON file, or none."""
    whole = value = json.loads(path.read_text())
    for key in at[:-1]:
        value = value[key]
    if odd == "drop":
        del value[at[-1]]
    else:
        value[at[-1]] = odd
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def number_nudged(path, at):
    """A number as a disk or a person might change it: another one that is possible."""
    whole = value = json.loads(path.read_text())
    for key in at[:-1]:
        value = value[key]
    value[at[-1]] = not value[at[-1]] if isinstance(value[at[-1]], bool) else value[at[-1]] + 1
    path.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")


def told(odd):
    """A value in a few words."""
    return f"{str(odd)[:12]}..." if len(str(odd)) > 24 else repr(odd)


def strangers(path, other):
    """Whole files that belong elsewhere: one beside it, the one in a folder beside its own, that of another world.

    Args:
        path: of the file.
        other: of the same file in the other world.
    """
    beside = [one for one in sorted(path.parent.iterdir()) if one.suffix == path.suffix]
    cousins = [one / path.name for one in sorted(path.parents[1].iterdir()) if one.is_dir()]
    named = {"of its neighbour": beside, "of a folder beside": cousins, "of another": [other]}
    own, found = path.read_bytes(), {}
    for name, paths in named.items():
        contents = [one.read_bytes() for one in paths if one.is_file()]
        content = next((one for one in contents if one != own and one not in found.values()), None)
        if content is not None:
            found[name] = content
    return {name: rewritten(lambda _, content=content: content) for name, content in found.items()}


def damages_of(path, rng, other):
    """Every damage of a file: its name -> what does it. other: the same file in the other world."""
    found = {**DAMAGES, **strangers(path, other)}
    if path.suffix in (".json", ".jsonl", ".toml"):
        found |= OF_TEXT
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        where = places(value)
        for at in rng.sample(where, min(EACH, len(where))):
            odd = rng.choice(ODD)
            found[f"{'.'.join(map(str, at))[:60]} = {told(odd)}"] = partial(set_field, at=at, odd=odd)
        numbers = [at for at in where if isinstance(at_in(value, at), int | float)]
        for at in rng.sample(numbers, min(EACH // 3, len(numbers))):
            found[f"{'.'.join(map(str, at))[:60]} another number"] = partial(number_nudged, at=at)
    return dict([*found.items()][:: 9 if SMOKE else 1])


def at_in(value, at):
    for key in at:
        value = value[key]
    return value


# ----------------------------------------------------------------------------------------------------- hostile weights


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(change):
    """A safetensors file with another header."""

    def damage(path):
        header, rest = header_of(path.read_bytes())
        text = change(header)
        text = text if isinstance(text, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + rest)

    return damage


def first(header):
    return header[sorted(name for name in header if name != "__metadata__")[0]]


def entry(key, value):
    return with_header(lambda header: first(header).update({key: value}))


HOSTILE = {
    "a header of 2**62 bytes": rewritten(lambda content: (2**62).to_bytes(8, "little") + content[8:]),
    "a header of 0 bytes": rewritten(lambda content: bytes(8) + content[8:]),
    "a header that is a list": with_header(lambda header: b"[]"),
    "a header nested deep": with_header(lambda header: b'{"a":' * 50_000),
    "a header that is not UTF-8": with_header(lambda header: b'{"\xff": 1}'),
    **{f"dtype {value!r}": entry("dtype", value) for value in ("F64", "I8", "BOOL", "X9", 3, None, "F8_E4M3")},
    **{
        f"shape {value}": entry("shape", value)
        for value in ([-1], [2**62, 2**62], [], ["a"], None, [0], [1.5], [1] * 100)
    },
    **{
        f"offsets {value}": entry("data_offsets", value)
        for value in ([0, 2**62], [4, 0], [-4, 0], [0], "a", None, [0, 0], [2**63, 2**64])
    },
    "no offsets": with_header(lambda header: first(header).pop("data_offsets")),
    "an entry more": with_header(
        lambda header: header.update(more={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    ),
    "an entry less": with_header(lambda header: header.pop(sorted(header)[0])),
    "metadata that is a list": with_header(lambda header: header.update(__metadata__=[1])),
    "NaN": rewritten(lambda content: content[:-4] + b"\x00\x00\xc0\x7f"),
    "Inf": rewritten(lambda content: content[:-4] + b"\x00\x00\x80\x7f"),
}


def fuzzed(model, rng):
    """(file, damage, what does it) of FUZZED configurations and of every file of weights."""
    found = []
    weights = "unet/diffusion_pytorch_model.safetensors"
    found += [(weights, name, act) for name, act in list(HOSTILE.items())[:: 12 if SMOKE else 1]]
    files = {name: json.loads((model / name).read_text()) for name in CONFIGS}
    while len(found) < FUZZED:
        name = rng.choice(sorted(files))
        at = rng.choice([*places(files[name]), *((key,) for key in CONFIGS[name])])
        odd = rng.choice([one for one in ODD if one != "drop"])
        if (isinstance(odd, bool) and at[-1] in SWITCHES) or (odd == 0 and at[-1] in ZERO) or (odd, at[-1]) == NONE:
            continue  # which means something
        if odd == at_or_none(files[name], at) or (name, label := f"{'.'.join(map(str, at))} = {told(odd)}") in [
            (file, damage) for file, damage, _ in found
        ]:
            continue
        found.append((name, label, partial(set_field, at=at, odd=odd)))
    return found


def at_or_none(value, at):
    try:
        return at_in(value, at)
    except (KeyError, IndexError, TypeError):
        return None


SWITCHES = ("center_input_sample", "flip_sin_to_cos", "clip_sample", "thresholding", "rescale_betas_zero_snr")
SWITCHES = (*SWITCHES, "set_alpha_to_one", "add_attention")
NONE = (None, "attention_head_dim")  # one head
ZERO = ("freq_shift", "steps_offset", "dropout", "downsample_padding")
CONFIGS = {
    "model_index.json": ("vae", "text_encoder", "_diffusers_version", "custom_pipeline", "auto_map"),
    "unet/config.json": (
        *("act_fn", "attention_head_dim", "center_input_sample", "class_embed_type", "downsample_padding", "dropout"),
        *(
            "flip_sin_to_cos",
            "freq_shift",
            "layers_per_block",
            "mid_block_scale_factor",
            "norm_eps",
            "time_embedding_type",
        ),
        *(
            "norm_num_groups",
            "num_class_embeds",
            "out_channels",
            "sample_size",
            "in_channels",
            "resnet_time_scale_shift",
        ),
        *("num_train_timesteps", "auto_map", "_class_name"),
    ),
    "scheduler/scheduler_config.json": (
        *("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "prediction_type"),
        *("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
        *("rescale_betas_zero_snr", "steps_offset", "timestep_spacing", "variance_type", "set_alpha_to_one"),
    ),
}
"""Files, and entries that a class of diffusers knows though they need not stand there."""


# -------------------------------------------------------------------------------------------------------------- campaign


def pictures(count, seed):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make(world, call=called, seed=0):
    """A model, a run folder and a ledger, of images from a seed."""
    owners = [{"creator": "anna" if i % 3 else "ben"} for i in range(IMAGES)]
    save_png(world / "images", pictures(IMAGES, seed), [f"{i:02d}" for i in range(IMAGES)], owners)
    save_png(world / "references", pictures(30, 2), [f"r{i:02d}" for i in range(30)])
    for words in MAKING:
        done = call(Command(words), world)
        if done.code:
            raise SystemExit(f"{words}: {done.err}")


class Campaign:
    """A world that is damaged and restored, again and again, at one place."""

    def __init__(self, home, notes=None):
        self.home, self.world, self.rows = home, home / "world", []
        self.notes, self.before = notes, {}
        if notes is not None and notes.is_file():
            lines = notes.read_bytes().split(b"\n")[:-1]  # what stands behind the last end of a line is half a line
            notes.write_bytes(b"".join(line + b"\n" for line in lines))
            self.before = {(one["file"], one["damage"]): one for one in map(json.loads, lines)}
        make(self.world, seed=3)
        self.other = Path(shutil.move(self.world, home / "other"))
        make(self.world)
        self.kept = shutil.copytree(self.world, home / "kept")

    def restore(self):
        shutil.rmtree(self.world)
        shutil.copytree(self.kept, self.world)

    def whole(self, commands):
        """What each command gives of whole files, twice the same."""
        found = {}
        for name, command in commands.items():
            pair = []
            for _ in range(2):
                self.restore()
                pair.append(called(command, self.world) if not pair or not SMOKE else pair[0])
            if pair[0].code or pair[0] != pair[1]:
                raise SystemExit(f"{name} does not give the same twice: {pair[0].err} {pair[0].out} | {pair[1].out}")
            found[name] = pair[0]
        return found

    def try_out(self, kind, folder, file, damage, act, commands, whole):
        """One damage of one file, and every command after it, unless it was tried before; the commands that it mattered to,
        for they read the file."""
        found = self.before.get((file, damage))
        if found is None:
            rows, read = self.tried(kind, folder, file, damage, act, commands, whole)
            found = {"file": file, "damage": damage, "rows": rows, "read": sorted(read)}
            if self.notes is not None:
                with self.notes.open("a") as notes:
                    notes.write(json.dumps(found) + "\n")
        self.rows += found["rows"]
        return set(found["read"])

    def tried(self, kind, folder, file, damage, act, commands, whole):
        """The row of each command, and those that the damage mattered to."""
        path, rows, read = self.world / folder / file, [], set()
        for name, command in commands.items():
            self.restore()
            act(path)
            damaged = path.read_bytes() if path.is_file() else None
            done = called(command, self.world)
            names = {path.name, str(path.parent), f"{path.parent.name}/"}
            if name == "verify" and any(file.startswith(cache) for cache in CACHES):
                done = replace(
                    done, out=whole[name].out if done.code == 0 else done.out
                )  # fewer files, none that counts
            found = outcome(done, whole[name], names, name == "doctor")
            row = {"of": kind, "file": file, "damage": damage, "command": name, "outcome": found}
            if found in BAD:
                row["said"] = (done.err.strip().splitlines() or done.out.strip().splitlines() or [""])[-1][-300:]
                if found == "traceback" and len(lines := done.err.strip().splitlines()) > 1:
                    row["said"] = " | ".join(line.strip()[:160] for line in lines[-5:-1])
            rows.append(row)
            if found != "same" or damaged != (path.read_bytes() if path.is_file() else None):
                read.add(name)
        return rows, read

    def every_file(self, kind, commands, part=0, skip=lambda path: False):
        """Every damage of every file of a folder. part: which of PARTS, that take turns with the files."""
        commands = dict([*commands.items()][-2:]) if SMOKE else commands
        whole = self.whole(commands)
        files = [path for path in sorted((self.kept / kind).rglob("*")) if path.is_file() and not skip(path)]
        for path in files[:: 120 if SMOKE else 1][part :: PARTS[kind]]:
            file, read = str(path.relative_to(self.kept / kind)), set()
            every = damages_of(path, random.Random(file), self.other / kind / file)
            for number, (damage, act) in enumerate([*every.items()][: 2 if SMOKE else None]):
                asked = {name: commands[name] for name in commands if number < len(SURE) or name in read}
                read |= self.try_out(kind, kind, file, damage, act, asked, whole)
        say(kind, self.rows)

    def every_fuzz(self, part=0):
        """Nonsense in the files of a model, of which nothing is known besides."""
        whole = self.whole(FRESH)
        for file, damage, act in fuzzed(self.kept / "model", random.Random(0)):
            self.try_out("fuzz", "model", file, damage, act, FRESH, whole)
        say("fuzz", self.rows)


def say(kind, rows):
    print(kind, dict(Counter(row["outcome"] for row in rows if row["of"] == kind)), flush=True)


def alike(path):
    """Of files of which there are many of a kind, the first two are damaged."""
    number = path.parent.name if path.parent.name.isdigit() else path.stem if path.stem.isdigit() else ""
    features = sorted(path.parents[1].glob("features/*")) or sorted(path.parents[1].iterdir())
    return (len(number) == 5 and int(number) > 1) or (
        path.parents[1].name == "features" and path.parent in features[2:]
    )


def counted(rows):
    """Outcomes by folder, and by folder and command."""
    found = {}
    for row in rows:
        for key in (row["of"], f"{row['of']}: {row['command']}"):
            found.setdefault(key, Counter())[row["outcome"]] += 1
    return {key: dict(counts) for key, counts in sorted(found.items())}


def warm(home):
    """Everything once in this process, so that its forks need not import what it needs."""
    make(home, here)
    for command in (*RUN.values(), *OF_LEDGER.values(), *OF_MODEL.values()):
        here(command, home)
    gc.freeze()


KINDS = {
    "run": lambda done, part: done.every_file("run", {**RUN, **CHECKED}, part, alike),
    "ledger": lambda done, part: done.every_file("ledger", {**OF_LEDGER, **REPAIRED}, part, alike),
    "model": lambda done, part: done.every_file("model", OF_MODEL, part),
    "fuzz": lambda done, part: done.every_fuzz(part),
}
PARTS = dict.fromkeys(KINDS, 1) | ({} if SMOKE else {"run": 3})
"""Into how many processes a kind is cut."""


def tried(home, *kinds, part=0, notes=None):
    """The rows of some kinds, in one world."""
    done = Campaign(home, notes)
    for kind in kinds:
        KINDS[kind](done, part)
    return done.rows


def side_by_side(home, kinds, notes):
    """The kinds, and parts of them, in processes of their own."""
    pids, begun = {}, time.monotonic()
    for kind, part in ((one, part) for one in kinds for part in range(PARTS[one])):
        name = f"{kind}-{part}"
        pids[name] = os.fork()
        if pids[name] == 0:
            code = 1
            try:
                rows = tried(home / name, kind, part=part, notes=notes / f"{name}.jsonl")
                (notes / f"{name}.json").write_text(json.dumps(rows))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
    for name, pid in pids.items():
        if os.waitpid(pid, 0)[1]:
            raise SystemExit(f"{name} has not come to its end")
    for kind in kinds:
        rows = [row for part in range(PARTS[kind]) for row in json.loads((notes / f"{kind}-{part}.json").read_text())]
        told = {"commit": notes.name, "seconds": round(time.monotonic() - begun), "rows": rows}
        (notes.parent / f"{kind}.json").write_text(json.dumps(told))


def campaign(kinds):
    """All of it: counts, and what became of each file under each command; None while kinds are missing."""
    notes = RUNS / "damage" / commit()
    if "+" in notes.name:  # of what, nobody could say later
        shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir(parents=True, exist_ok=True)
    left = [kind for kind in kinds if ended(kind).get("commit") != notes.name]
    with tempfile.TemporaryDirectory(dir=FAST if FAST.is_dir() else None) as home:
        if SMOKE:
            warm(Path(home) / "warm")
            return summed({"all": {"rows": tried(Path(home) / "all", *KINDS)}}, commit())
        if left:
            warm(Path(home) / "warm")
            side_by_side(Path(home), left, notes)
    found = {kind: ended(kind) for kind in KINDS}
    if not all(found.values()):
        return None
    commits = {kind: each["commit"] for kind, each in found.items()}
    return summed(found, notes.name if len({*commits.values()}) == 1 else commits)


def ended(kind):
    """What became of a kind that has come to its end, {} of another."""
    path = RUNS / "damage" / f"{kind}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def summed(found, commits):
    """Counts of outcomes, by folder, command and file, and all that must not be.

    Args:
        found: kind -> its rows, and the seconds that they took.
        commits: of all, or kind -> of it.
    """
    rows = [row for each in found.values() for row in each["rows"]]
    cases = {(row["of"], row["file"], row["damage"]) for row in rows}
    told = [row for row in rows if row["outcome"] in BAD]
    table = {}  # file -> command -> outcomes of all its damages
    for row in rows:
        cell = table.setdefault(f"{row['of']}/{row['file']}", {}).setdefault(row["command"], Counter())
        cell[row["outcome"]] += 1
    return {
        "commit": commits,
        "damages": sum(case[0] != "fuzz" for case in cases),
        "fuzzed": sum(case[0] == "fuzz" for case in cases),
        "calls": len(rows),
        "seconds": max(each.get("seconds", 0) for each in found.values()),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "by command": counted(rows),
        "table": table,
        "what must not be": told,
    }


def main():
    name, *kinds = sys.argv[1:] or ["after"]
    os.environ.update(WHENCE_QUIET="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    found = campaign([kind for kind in kinds or KINDS if kind in KINDS])
    if found is None:
        return print("the other kinds are missing")
    before = RESULTS / "damage.json"
    runs = json.loads(before.read_text())["runs"] if before.is_file() else {}
    path = record("damage", {"question": __doc__.splitlines()[0], "runs": {**runs, name: found}})
    from damage_page import page

    target = RUNS / "damage.md" if SMOKE else ROOT / "docs" / "damage.md"
    target.write_text(page(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
