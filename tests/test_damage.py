"""What whence wrote is what it reads: checksums, types, digests of pictures, `whence verify`; and settings of models that
mean nothing. (Of ledgers: test_ledger.)"""

from __future__ import annotations

import json
import resource
import shutil
from inspect import signature
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file

from errors import refuses
from test_cli import noise, refused, succeeds, whence
from whence.curvature import factors
from whence.data.saving import save_png
from whence.models import new_network, new_scheduler, open_model, save_pipeline
from whence.models.settings import refuse_settings
from whence.storage.arrays import Store, read_checked, values_digest, write_checked, write_tensors
from whence.storage.files import bytes_digest, note_once, read_json, read_object, write_json
from whence.storage.jsons import DEEPEST, plain_text, sealed, unexpected
from whence.types import WhenceError

VALUE: dict[str, Any] = {"name": "x", "numbers": [1, 2.5, -3], "inner": {"a": None, "b": True}, "é": "ü \ud800"}

# -------------------------------------------------------------------------------------------------------------- checksums


@pytest.mark.parametrize("ordered", [False, True])
def test_every_byte_of_a_file_is_guarded(tmp_path, ordered):
    """Each bit that flips is told, or was of white space; what is cut or added, too."""
    path = tmp_path / "a.json"
    write_json(path, VALUE, ordered)
    assert read_json(path) == VALUE
    content, seen, lines = path.read_bytes(), set(), set()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        try:
            found = read_json(path)
        except WhenceError as error:
            seen.add(place)
            line = str(error)
            lines.add((str(path) in line, len(line.splitlines())))
        else:
            assert {name: found.get(name) for name in VALUE} == VALUE, "the name of the checksum alone"
    assert lines == {(True, 1)}
    assert len(seen) > 0.9 * len(content)
    for damaged in (content[:-5], content + b"\0", b"", content.replace(b'"x"', b'"y"'), b"\xff" + content):
        path.write_bytes(damaged)
        with pytest.raises(WhenceError, match=r"a\.json: (cannot be read as JSON|its content does not match)"):
            read_json(path)


def test_files_of_earlier_versions_and_of_others_have_no_checksum(tmp_path):
    path = tmp_path / "a.json"
    for text in (json.dumps(VALUE), json.dumps(VALUE, indent=1, sort_keys=True) + "\n", "\ufeff" + json.dumps(VALUE)):
        path.write_text(text, encoding="utf-8")
        assert read_json(path) == read_object(path) == VALUE
    path.write_text(json.dumps({"checksum": "mine"}))
    assert read_object(path) == {"checksum": "mine"}
    for value in ([1, 2], {}, 3, None, "text"):  # nothing to put one into
        write_json(path, value)
        assert read_json(path) == value


def test_what_is_noted_once_comes_back_without_its_checksum(tmp_path):
    assert note_once(tmp_path / "a.json", VALUE) == VALUE == note_once(tmp_path / "a.json", {"other": 1})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 10**6, "nested"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), f"nested more than {DEEPEST} deep"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ('{"a": -Infinity}', "Infinity is no number of JSON"),
        (f'{{"a": {"9" * 10_000}}}', "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("", "cannot be read as JSON"),
    ],
)
def test_what_is_no_json_of_ours_is_refused(tmp_path, text, why):
    (tmp_path / "a.json").write_text(text)
    with refuses(f"a.json: cannot be read as JSON ...{why.removeprefix('cannot be read as JSON')}"):
        read_json(tmp_path / "a.json")


def test_schedulers_of_others_may_hold_infinity(tmp_path):
    (tmp_path / "a.json").write_text('{"lambda_min_clipped": -Infinity}')
    assert read_object(tmp_path / "a.json") == {"lambda_min_clipped": -float("inf")}


def test_a_whole_file_under_another_name_is_told(tmp_path):
    """Of this version; earlier ones had a checksum of the text alone."""
    write_json(tmp_path / "a.json", VALUE)
    (tmp_path / "b.json").write_bytes((tmp_path / "a.json").read_bytes())
    with refuses("was changed, damaged or renamed", "b.json"):
        read_json(tmp_path / "b.json")
    text = plain_text(VALUE)
    (tmp_path / "b.json").write_bytes(sealed(text, bytes_digest(text)))
    assert read_json(tmp_path / "b.json") == VALUE


TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


def test_arrays_say_what_they_are(tmp_path):
    """By their names, shapes and types, and by the place that they were written for."""
    path = tmp_path / "x.safetensors"
    write_checked(path, TENSORS, "run 1/step 2")
    for of in (None, "run 1/step 2"):
        assert read_checked(path, of=of).keys() == TENSORS.keys()
    with refuses("it belongs elsewhere", accepted="") as caught:
        read_checked(path, "train again", "run 1/step 3")
    assert str(path) in str(caught.value)
    assert "train again" in str(caught.value)
    with safe_open(path, framework="pt") as file:
        seal = file.metadata()
    others = ({"a": TENSORS["a"].reshape(3, 2), "b": TENSORS["b"]}, {"a": TENSORS["b"], "b": TENSORS["a"]})
    others = (*others, {"a": TENSORS["a"].view(torch.int32), "b": TENSORS["b"]}, {"A": TENSORS["a"], "b": TENSORS["b"]})
    for other in others:
        write_tensors(path, other, seal)
        with refuses("its content does not match its digest"):
            read_checked(path)
    write_tensors(path, TENSORS, {"sha256": seal["sha256"].replace("step 2", "step 3")})
    with refuses("its content does not match its digest"):
        read_checked(path)
    write_tensors(path, TENSORS, {"sha256": values_digest(TENSORS["a"], TENSORS["b"])})  # of an earlier version
    assert read_checked(path, of="anything").keys() == TENSORS.keys()


def test_a_whole_shard_in_the_place_of_another_is_told(tmp_path):
    """Of the same array, and of one that is as large."""
    one, other = (Store(tmp_path).array({"of": of}, (6, 2), torch.float32, 3) for of in "ab")
    for array in (one, other):
        for number, rows in enumerate(array.shards):
            array.write(rows, torch.full((3, 2), float(number)))
    first, second = (one.path(rows) for rows in one.shards)
    for source in (second, other.path(other.shards[0])):
        before = first.read_bytes()
        first.write_bytes(source.read_bytes())
        with refuses(f"{first}: it belongs elsewhere"):
            one.read(one.shards[0])
        with refuses("it belongs elsewhere"):
            one.verify()
        first.write_bytes(before)
    one.verify()


def test_sums_of_another_curvature_are_told(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        factors.write(tmp_path / folder / "sums.safetensors", TENSORS, 3)
    assert factors.read(tmp_path / "a" / "sums.safetensors")[1] == 3
    shutil.copy(tmp_path / "a" / "sums.safetensors", tmp_path / "b")
    shutil.copy(tmp_path / "a" / "sums.safetensors", tmp_path / "a" / "others.safetensors")
    for path in (tmp_path / "b" / "sums.safetensors", tmp_path / "a" / "others.safetensors"):
        with refuses(f"{path}: it belongs elsewhere"):
            factors.read(path)
    save_file(TENSORS, tmp_path / "a" / "sums.safetensors")
    with refuses("holds no sums of whence"):
        factors.read(tmp_path / "a" / "sums.safetensors")


# ------------------------------------------------------------------------------------------------------------------ types


class Inner(TypedDict):
    name: str
    pairs: list[tuple[str, int]]


class Outer(TypedDict):
    inner: Inner
    sure: bool
    rate: float
    more: NotRequired[dict[str, list[int]] | None]


WHOLE = {"inner": {"name": "a", "pairs": [["b", 1]]}, "sure": True, "rate": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, ""),
        ({"more": None}, ""),
        ({"more": {"a": [1, 2]}, "unknown": 3}, ""),
        (
            {"more": {"a": [1, None]}},
            "`more` is an object of 1 entries; accepted: an object of lists of whole numbers or null",
        ),
        ({"inner": 3}, "`inner` is 3; accepted: an object"),
        ({"inner": {"name": "a"}}, "`inner.pairs` is missing"),
        ({"inner": {"name": None, "pairs": []}}, "`inner.name` is null; accepted: a text"),
        ({"inner": {"name": "a", "pairs": [["b"]]}}, "`inner.pairs.0` is a list of 1 entries; accepted: a list of 2"),
        ({"inner": {"name": "a", "pairs": [["b", 1.5]]}}, "`inner.pairs.0.1` is 1.5; accepted: a whole number"),
        ({"sure": 1}, "`sure` is 1; accepted: a truth value"),
        ({"rate": True}, "`rate` is true; accepted: a number"),
        ({"rate": 1e400}, "`rate` is Infinity; accepted: a number"),
        ({"rate": 10**40}, "`rate` is a number of 41 digits; accepted: a number"),
        ({"rate": "x" * 1000}, "`rate` is a text of 1,000 characters; accepted: a number"),
    ],
)
def test_the_field_that_is_wrong_is_named(change, told):
    found = unexpected({**WHOLE, **change}, Outer)
    assert found.startswith(told)
    assert bool(found) == bool(told)


def test_a_file_of_another_type_is_refused(tmp_path):
    write_json(tmp_path / "a.json", [WHOLE])
    with refuses("it holds a list of 1 entries", "a.json", "an object; remove it to compute it again"):
        read_json(tmp_path / "a.json", Outer)


# --------------------------------------------------------------------------------------------------------------- settings

UNET, CROSS, VAE, DDPM = UNet2DModel, UNet2DConditionModel, AutoencoderKL, DDPMScheduler


@pytest.mark.parametrize(
    ("kind", "name", "value", "accepted"),
    [
        (UNET, "in_channels", "../../etc", "a whole number"),
        (UNET, "in_channels", -1, "1 or more"),
        (UNET, "layers_per_block", float("inf"), "1000 at most"),
        (UNET, "layers_per_block", 10**9, "1000 at most"),
        (UNET, "norm_eps", float("nan"), "above 0"),
        (UNET, "dropout", 1.5, "1 at most"),
        (UNET, "act_fn", [1, 2], "a text"),
        (UNET, "center_input_sample", None, "true or false"),
        (UNET, "mid_block_scale_factor", None, "a number"),
        (UNET, "block_out_channels", [16, -16], "1 or more"),
        (UNET, "class_embed_type", "os.system", "timestep"),
        (CROSS, "cross_attention_dim", {"a": 1}, "a whole number or a list"),
        (VAE, "scaling_factor", 0.0, "above 0"),
        (DDPM, "num_train_timesteps", -1, "1 or more"),
        (DDPM, "trained_betas", "os.system", "a list"),
        (DDPM, "beta_end", float("nan"), "above 0"),
        (DDPM, "timestep_spacing", "sideways", "leading, trailing, linspace"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(kind, name, value, accepted):
    with refuses(f"{name} is ", "config.json", accepted):
        refuse_settings(kind, {"_class_name": kind.__name__, name: value}, Path("config.json"))


def test_settings_as_they_are_written_pass():
    """Those of classes themselves, and of published models."""
    for kind in (UNET, CROSS, VAE, DDPM):
        own = {name: one.default for name, one in signature(kind).parameters.items()}
        refuse_settings(kind, json.loads(json.dumps(own)), Path("config.json"))
    published = {
        "attention_head_dim": [5, 10, 20, 20],
        "num_class_embeds": None,
        "transformer_layers_per_block": [1, 2, 10],
    }
    refuse_settings(CROSS, {**published, "unheard_of": 3}, Path("config.json"))
    refuse_settings(DDPM, {"lambda_min_clipped": -float("inf"), "trained_betas": None, "steps_offset": 1}, Path("x"))


# ------------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "model"
    config = {"_class_name": "MLPDenoiser", "sample_size": 8, "in_channels": 1, "width": 8, "layers": 1}
    network = new_network(config, 0)
    save_pipeline(folder, network, dict(network.state_dict()), new_scheduler(100, "linear", "epsilon"))
    return folder


def words(pipeline: Path, run: Path, method: str = "pixel_dot") -> tuple[object, ...]:
    asked = ("--generate", 2, "--num_inference_steps", 2, "--method", method, "--output_dir", run)
    return ("attribute", pipeline, "--train_data_dir", pipeline.parent / "images", *asked)


@pytest.fixture(scope="module")
def kept(pipeline) -> Path:
    save_png(
        pipeline.parent / "images",
        noise(6, 0),
        [f"{i}" for i in range(6)],
        [{"creator": "a" if i % 2 else "b"} for i in range(6)],
    )
    run = pipeline.parent / "run"
    succeeds(*words(pipeline, run))
    succeeds("credit", run)
    return run


@pytest.fixture
def run(kept, tmp_path) -> Path:
    """A copy beside its model and its images, where it looks for them."""
    copy = kept.with_name(tmp_path.name)
    shutil.copytree(kept, copy)
    yield copy
    shutil.rmtree(copy)


def test_a_whole_run_is_verified_and_what_is_unknown_is_named(run):
    assert "files are what was written" in succeeds("verify", run).out
    (run / "mine.txt").write_text("x")
    assert "mine.txt" in succeeds("verify", run).out


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


FILES = ("index.json", "images.json", "report.json", "report.html", "gallery.png", "generated.json", "digests.json")
FILES = (*FILES, "generated/seed0-0000.png", "generated/metadata.jsonl", "scores/pixel_dot/scores.json")
FILES = (*FILES, "scores/pixel_dot/scores.safetensors", "scores/pixel_dot/top.parquet", "credit/creator/receipt.json")
FILES = (*FILES, "credit/creator/credit.html", "credit/creator/pixel_dot.csv")


@pytest.mark.parametrize("name", FILES)
def test_whatever_changes_or_goes_is_named_by_verify(run, name):
    path = run / name
    before = path.read_bytes()
    flip(path)
    done = whence("verify", run)
    assert done.code == 2
    assert str(path) in done.out
    assert len(done.err.splitlines()) == 1
    path.unlink()
    if name != "digests.json":  # a cache
        assert str(path) in whence("verify", run).out
        path.mkdir()
        assert str(path) in whence("verify", run).out, "a folder in its place"
        path.rmdir()
    path.write_bytes(before)
    succeeds("verify", run)


def test_no_result_is_shown_that_was_changed(run, pipeline):
    """By a disk, and by a person who makes no new checksum."""
    for name, change in (("scores/pixel_dot/scores.json", b"rank"), ("report.json", b"Made")):
        path = run / name
        before = path.read_bytes()
        path.write_bytes(
            before.replace(b'"title": "', b'"title": "not ').replace(b'"scale": "rank"', b'"scale": "value"')
        )
        assert path.read_bytes() != before, change
        refused("report", run, says=f"{path.name}: its content does not match its checksum")
        path.write_bytes(before)
    flip(run / "generated" / "seed0-0000.png")
    for call in (("report", run), words(pipeline, run)):
        refused(*call, says=r"seed0-0000\.png: is not what was drawn .*removed, to draw again")
    shutil.rmtree(run / "generated")
    succeeds(*words(pipeline, run))
    (run / "generated" / "more.png").write_bytes((run / "generated" / "seed0-0001.png").read_bytes())
    refused("report", run, says=r"more\.png: was added")


def test_pictures_of_an_earlier_version_are_noted_when_they_are_seen(run, pipeline):
    noted = read_json(run / "generated.json")
    files, schedule = noted.pop("files"), noted.pop("schedule")
    write_json(run / "generated.json", noted)
    succeeds(*words(pipeline, run))
    assert read_json(run / "generated.json")["files"] == files
    write_json(run / "generated.json", {**noted, "files": files, "schedule": schedule[::-1]})
    refused(*words(pipeline, run), says="generated holds other pictures .schedule")


def test_what_a_page_told_is_missed_where_it_is_gone(run):
    noted = read_json(run / "report.json")
    write_json(run / "report.json", {**noted, "beside": ["copies.json", "scores/pixel_dot/attributable.json"]})
    (run / "copies.json").unlink(missing_ok=True)
    done = whence("verify", run)
    assert done.code == 2
    assert "attributable.json: is missing" in done.out
    succeeds("report", run, warns="(copies.json is gone: what looks like a copy|single images) is not told on the page")


def test_what_a_page_told_of_one_method_is_missed_after_another_one_ran(run, pipeline):
    """Whichever method ran last, and however often the page is written again."""
    note = run / "scores" / "pixel_dot" / "attributable.json"
    save_png(pipeline.parent / "references", noise(24, 5), [f"r{i:02d}" for i in range(24)])
    succeeds(*words(pipeline, run), "--reference_data_dir", pipeline.parent / "references")
    assert note.is_file()
    succeeds(*words(pipeline, run, "pixel_cosine"))
    note.unlink()
    for _ in range(2):
        done = whence("verify", run)
        assert done.code == 2
        assert "attributable.json: is missing" in done.out
        succeeds("report", run, warns="attributable.json is gone: which pictures lean on single images is not told")
    succeeds(*words(pipeline, run, "pixel_cosine"))
    succeeds("report", run, warns="attributable.json is gone")
    succeeds(*words(pipeline, run))  # of pixel_dot itself, without references: none is asked for
    succeeds("report", run)


def test_scores_that_lack_their_notes_are_told(run):
    shutil.copytree(run / "scores" / "pixel_dot", run / "scores" / "other")
    (run / "scores" / "other" / "scores.json").unlink()
    succeeds("report", run, warns="scores/other holds no scores.json: its scores are not finished, or lost")


def test_a_run_on_another_schedule_is_refused(run, pipeline):
    model = Path(shutil.copytree(pipeline, pipeline.with_name("other")))
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace('"beta_end": 0.02', '"beta_end": 0.03'))
    open_model(model)
    refused(*words(model, run), says=f"belongs to another model or data set .schedule: .* in .*{model}")


def test_whole_results_of_another_run_are_told(run, pipeline):
    """Scores, the index and what pictures lean on, each whole, from a run on other images."""
    save_png(pipeline.parent / "strangers", noise(6, 9), [f"{i}" for i in range(6)], [{"creator": "a"}] * 6)
    asked = ("--generate", 2, "--num_inference_steps", 2, "--method", "pixel_dot")
    other = run.with_name(f"{run.name}-other")
    succeeds("attribute", pipeline, "--train_data_dir", pipeline.parent / "strangers", *asked, "--output_dir", other)
    kept = shutil.copytree(run / "scores" / "pixel_dot", run.with_name(f"{run.name}-kept"))
    shutil.copytree(other / "scores" / "pixel_dot", run / "scores" / "pixel_dot", dirs_exist_ok=True)
    refused("credit", run, says="scores/pixel_dot: scores of other training images than .*images.json tells of")
    refused("remove-first", run, "--k", 2, says="scores of other training images")
    assert "pixel_dot: scores of other training images" in whence("verify", run).out
    shutil.copytree(kept, run / "scores" / "pixel_dot", dirs_exist_ok=True)
    succeeds("verify", run)
    shutil.copy(other / "index.json", run / "index.json")
    assert "index.json: is of other training images than images.json" in whence("verify", run).out


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_lost(kept, pipeline, tmp_path):
    """A disk that takes no file beyond some size stops a run at one step or another; the next one goes on."""
    before, stopped = resource.getrlimit(resource.RLIMIT_FSIZE), 0
    for most in (0, 50, 200, 1000, 3000, 30_000):
        run = tmp_path / str(most)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            done = whence(*words(pipeline, run))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if done.code:
            assert (done.code, len(done.err.splitlines())) == (2, 1), done
            assert str(run) in done.err, done
            stopped += 1
        assert not [path for path in run.rglob("*") if path.suffix in (".tmp", ".claim")]
        succeeds(*words(pipeline, run))
        succeeds("verify", run)
        scores = [(tmp_path / name / "scores/pixel_dot/scores.safetensors").read_bytes() for name in ("0", str(most))]
        assert scores[0] == scores[1]
    assert stopped > 3
