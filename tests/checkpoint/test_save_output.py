"""What an output may be, what it replaces, and how it comes to be: staged beside the target, synced, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_toys import files_in, layouts, mapped, write_model

from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
from mergekit_plus.errors import CheckpointError, OutputError

OLD = {"w": torch.zeros(4, 4)}
NEW = {"w": torch.ones(4, 4), "v": torch.ones(3)}
OVERWRITE = SaveOptions(overwrite=True)


def new() -> Checkpoint:
    return Checkpoint.from_tensors(NEW)


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    out = write_model(tmp_path / "out", OLD)
    save(Checkpoint.from_tensors(OLD), tmp_path / "x.safetensors")
    before = files_in(out), files_in(tmp_path)
    for target in (out, tmp_path / "x.safetensors"):
        with pytest.raises(OutputError, match=r"exists already; name another output with -o, or replace it with --overwrite"):
            save(new(), target)
    assert (files_in(out), files_in(tmp_path)) == before


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save(new(), tmp_path / "out")
    assert listing(tmp_path) == ["out", "out/manifest.json", "out/model.safetensors"]


@pytest.mark.parametrize("shards", [1, 2])
def test_overwrite_replaces_a_whole_model(tmp_path: Path, shards: int) -> None:
    out = write_model(tmp_path / "out", {**OLD, "other": torch.ones(1)}, shards)
    save(new(), out, OVERWRITE)
    assert listing(tmp_path) == ["out", "out/manifest.json", "out/model.safetensors"]
    save(new(), out, OVERWRITE)
    assert set(Checkpoint.open(out).specs) == {"w", "v"}


def test_overwrite_replaces_a_file(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    save(Checkpoint.from_tensors(OLD), out)
    save(new(), out, OVERWRITE)
    assert listing(tmp_path) == ["x.manifest.json", "x.safetensors"]
    assert set(Checkpoint.open(out).specs) == {"w", "v"}


@pytest.mark.parametrize("files", [["notes.txt"], ["a.safetensors", "b.safetensors"], ["manifest.json", "background.js"], ["config.json"]])
def test_overwrite_does_not_delete_a_folder_that_is_no_model(tmp_path: Path, files: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in files:
        (out / name).write_text("precious")
    with pytest.raises(OutputError, match="is a folder without a model in it; --overwrite replaces models only"):
        save(new(), out, OVERWRITE)
    assert listing(out) == sorted(files)


def test_overwrite_does_not_delete_folders_inside_a_model(tmp_path: Path) -> None:
    out = write_model(tmp_path / "out", OLD)
    (out / ".git").mkdir()
    with pytest.raises(OutputError, match=r"holds the folder \.git, which --overwrite would delete"):
        save(new(), out, OVERWRITE)
    assert (out / ".git").is_dir()


def test_a_file_where_a_folder_should_be_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    (tmp_path / "x.safetensors").mkdir()
    for name, kind in (("out", "file"), ("x.safetensors", "folder")):
        with pytest.raises(OutputError, match=rf"{name} is a {kind}; an output is a folder, or a file that ends in \.safetensors"):
            save(new(), tmp_path / name, OVERWRITE)
    assert (tmp_path / "out").read_text() == "precious"


def test_an_output_is_never_an_input_nor_holds_one(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models" / "in", OLD)
    (tmp_path / "link").symlink_to(folder)
    source = Checkpoint.open(folder)
    for out in (folder, tmp_path / "models", tmp_path / "link", folder / "model.safetensors", folder / ".." / "in"):
        for checkpoint in (source, mapped(mapped(source, torch.neg), torch.neg)):
            with pytest.raises(OutputError, match="is one of the inputs, or holds one; write somewhere else with -o"):
                save(checkpoint, out, OVERWRITE)
    assert torch.equal(Checkpoint.open(folder).read("w"), OLD["w"])


def test_the_hubs_cache_is_not_written_over_though_its_files_are_links(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "snapshots" / "main", OLD)
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    with pytest.raises(OutputError, match="is one of the inputs, or holds one"):
        save(Checkpoint.open(folder), folder, OVERWRITE)


def test_an_output_inside_an_inputs_folder_leaves_the_input_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "in", OLD)
    before = files_in(folder)
    save(Checkpoint.open(folder), folder / "copy")
    save(Checkpoint.open(folder), folder / "copy.safetensors")
    assert {name: files_in(folder)[name] for name in before} == before
    assert listing(folder / "copy") == ["config.json", "manifest.json", "model.safetensors"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    real = write_model(tmp_path / "disk" / "real", OLD)
    (tmp_path / "out").symlink_to(real)
    save(new(), tmp_path / "out", OVERWRITE)
    assert (tmp_path / "out").is_symlink()
    assert set(Checkpoint.open(real).specs) == {"w", "v"}
    assert listing(tmp_path) == ["disk", "disk/real", "disk/real/manifest.json", "disk/real/model.safetensors", "out"]


def test_the_parent_must_exist_and_be_writable(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="the folder .*nowhere does not exist"):
        save(new(), tmp_path / "nowhere" / "out")
    with pytest.raises(OutputError, match="/proc: .*; choose an output folder that can be written, with -o"):
        save(new(), Path("/proc/out"))


def test_a_disk_that_is_too_small_is_known_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 950, 50))
    with pytest.raises(OutputError, match=r"0\.00 GB to write but only 0\.00 GB are free"):
        save(mapped(new(), lambda tensor: pytest.fail("computed")), tmp_path / "out")  # type: ignore[arg-type, return-value]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "folder_mode", "file_mode"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, folder_mode: int, file_mode: int) -> None:
    folder = write_model(tmp_path / "in", NEW)
    before = os.umask(umask)
    try:
        save(Checkpoint.open(folder), tmp_path / "out", SaveOptions(max_shard_size=1), lambda manifest, folder: {"README.md": b""})
        save(new(), tmp_path / "x.safetensors")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode
    files = [*(tmp_path / "out").iterdir(), tmp_path / "x.safetensors", tmp_path / "x.manifest.json"]
    assert {path.stat().st_mode & 0o777 for path in files} == {file_mode}


# ---- the order of things


class Disk:
    """What is synced and renamed, in order; and what a reader would find under the final name at each moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.events: list[tuple[str, str]] = []
        self.visible: list[frozenset[str] | None] = []
        self.out = out
        fsync, replace = os.fsync, os.replace

        def spied_fsync(fd: int) -> None:
            fsync(fd)
            self.events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))

        def spied_replace(source: Path, target: Path) -> None:
            self.look()
            replace(source, target)
            self.look()
            self.events.append(("replace", f"{Path(source).name} -> {Path(target).name}"))

        monkeypatch.setattr(os, "fsync", spied_fsync)
        monkeypatch.setattr(os, "replace", spied_replace)

    def look(self) -> None:
        self.visible.append(frozenset(path.name for path in self.out.iterdir()) if self.out.exists() else None)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "in", NEW)
    disk = Disk(monkeypatch, tmp_path / "out")
    save(Checkpoint.open(folder), tmp_path / "out", SaveOptions(max_shard_size=1))
    renamed = [number for number, (event, _) in enumerate(disk.events) if event == "replace"]
    assert len(renamed) == 1
    synced = {name for event, name in disk.events[: renamed[0]] if event == "fsync"}
    staged = disk.events[renamed[0]][1].split(" -> ")[0]
    assert synced == {*(path.name for path in (tmp_path / "out").iterdir()), staged}
    assert [name for _, name in disk.events[renamed[0] + 1 :]] == [".out.partial", tmp_path.name]


def test_at_no_moment_is_there_half_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_model(tmp_path / "out", {**OLD, "x": torch.ones(1)}, 2)
    old = frozenset(files_in(out))
    disk = Disk(monkeypatch, out)
    save(new(), out, OVERWRITE)
    complete = frozenset({"model.safetensors", "manifest.json"})
    assert disk.visible == [old, None, None, complete]


def test_a_file_comes_before_the_manifest_that_vouches_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, tmp_path / "x.safetensors")
    monkeypatch.setattr(disk, "look", lambda: None)
    save(new(), tmp_path / "x.safetensors")
    assert [name.split(" -> ")[1] for event, name in disk.events if event == "replace"] == ["x.safetensors", "x.manifest.json"]


def failing_replace(monkeypatch: pytest.MonkeyPatch, fails: Callable[[Path, Path], bool], error: BaseException) -> None:
    replace = os.replace

    def maybe(source: Path, target: Path) -> None:
        if fails(Path(source), Path(target)):
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", maybe)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_what_was_there_comes_back_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    out = write_model(tmp_path / "out", OLD)
    before = files_in(out)
    failing_replace(monkeypatch, lambda source, target: source.name == "files", error)
    with pytest.raises((OutputError, KeyboardInterrupt), match="Input/output error; nothing was written|^$"):
        save(new(), out, OVERWRITE)
    assert files_in(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_came_to_exist_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def somebody_else(tensor: torch.Tensor) -> torch.Tensor:
        if not out.exists():
            write_model(out, OLD)
        return tensor

    with pytest.raises(OutputError, match="exists already"):
        save(mapped(Checkpoint.from_tensors(OLD), somebody_else), out)
    assert torch.equal(Checkpoint.open(out).read("w"), OLD["w"])
    assert listing(tmp_path) == ["out", "out/config.json", "out/model.safetensors"]


def test_a_small_file_that_is_gone_is_known_before_anything_is_computed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "in", OLD)
    checkpoint = mapped(Checkpoint.open(folder), lambda tensor: pytest.fail("computed"))  # type: ignore[arg-type, return-value]
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"mapped: config\.json cannot be read any more: No such file"):
        save(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_default_memory_is_half_of_what_is_free() -> None:
    layout = layouts.plan_save(new(), Path("out"), SaveOptions())
    assert 0 < layout.memory <= layouts._free_memory()
    assert 1 <= layout.workers <= len(os.sched_getaffinity(0))
    assert layout.bytes_read == 0 + sum(tensor.nbytes for tensor in NEW.values())
