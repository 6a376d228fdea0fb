"""Disks that fail, fill up, or are none: saving says so on all ranks alike, and what was there stays whole.

Rows C8, N5, D1 to D4 and D7 of the fault matrix.
"""

import errno
import os
import stat
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import product

import pytest
import tiny
import torch
from crashes import OPERATIONS, in_memory
from faultload import ALL, amount, cannot, draw, report
from forked import Injection, as_nobody, newest, on_ranks, operations, save, save_with_failures, state

from scaletrain import main
from scaletrain.checkpoint.export import WEIGHTS, export
from scaletrain.checkpoint.files import Files
from scaletrain.checkpoint.format import FOLDER, step_folder
from scaletrain.checkpoint.saver import Saver
from scaletrain.checkpoint.verify import newest_whole, open_checkpoint
from scaletrain.errors import CheckpointError
from scaletrain.run.resume import find

DISK_ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EINTR)


@pytest.fixture
def memory():
    with in_memory() as folder:
        yield folder


# Operations that fail


def check(outcome, injection, kinds):
    """Whether a save that failed said so, left the checkpoint before as it was, and the next one works."""
    publish = kinds.index("rename")
    published = injection.victim == 0 and injection.at > publish
    before = None if injection.first else 10
    assert outcome.kept == (20 if published else before), (injection, outcome)
    assert outcome.later == 30, (injection, outcome)
    if injection.once and not published:
        assert outcome.left == ([] if injection.first else [step_folder(10)]), (injection, outcome)
    rules = {"lose": "missing", "cut": "size"}
    usual = "disk" if isinstance(injection.how, OSError) else "saving"
    assert outcome.rule == rules.get(injection.how, usual), (injection, outcome)
    assert f"/{FOLDER}" in outcome.message
    if injection.how not in rules:
        why = os.strerror(injection.how.errno) if usual == "disk" else "RuntimeError: a bug"
        assert f": {usual}: {why} (on rank {injection.victim}); the checkpoints there are" in outcome.message


def disk_error(code):
    return OSError(code, os.strerror(code))


def test_whichever_operation_fails_saving_says_so_and_leaves_what_was_there(memory):
    random, groups = draw("C8"), (None, None)
    (memory / "sound").mkdir()
    first, second = operations(0, groups, memory / "sound")
    injections = [Injection(0, at, disk_error(code)) for at in range(len(second)) for code in DISK_ERRORS]
    injections += [Injection(0, at, disk_error(random.choice(DISK_ERRORS)), first=True) for at in range(len(first))]
    injections = random.sample(injections, amount(len(injections), 40))
    injections = [injection._replace(once=random.random() < 0.7) for injection in injections]
    outcomes = save_with_failures(0, groups, memory, injections)
    for outcome, injection in zip(outcomes, injections, strict=True):
        check(outcome, injection, first if injection.first else second)
    assert set(first + second) == set(OPERATIONS), "an operation that no save needs, or that none was made to fail at"
    report("C8 errors of the disk, one process", len(injections), "told with path and reason; nothing lost; goes on")


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_writes_that_fall_short_are_completed(tmp_path, most):
    class Short(Files):
        def write(self, descriptor, data):
            return super().write(descriptor, data[:most])

    save(tmp_path, 10, Short())
    assert newest(tmp_path) == 10


def test_what_fails_on_one_rank_alone_fails_on_both_with_the_same_words(memory):
    random = draw("N5")
    (memory / "sound").mkdir()
    kinds = [said for _, said in on_ranks(2, operations, memory / "sound", folder=memory)]
    injections = []
    for first, rank in product((True, False), (0, 1)):
        done = kinds[rank][0 if first else 1]
        errors = [(at, disk_error(random.choice(DISK_ERRORS))) for at in range(len(done))]
        errors += [(at, RuntimeError("a bug")) for at in (0, len(done) - 1)]
        injections += [Injection(rank, at, error, first=first) for at, error in errors]
    injections = random.sample(injections, amount(len(injections), 20))
    injections += [Injection(1, kinds[1][1].index("close"), how) for how in ("lose", "cut")]
    began = time.monotonic()
    (code, outcomes), (other_code, others) = on_ranks(2, save_with_failures, memory, injections, folder=memory)
    assert (code, other_code) == (0, 0)
    assert time.monotonic() - began < 30
    for outcome, other, injection in zip(outcomes, others, injections, strict=True):
        assert outcome[:2] == other[:2], "both ranks say the same"
        check(outcome, injection, kinds[0][0 if injection.first else 1])
    report("N5 errors on one of two ranks", len(injections), "both raise the same words; nothing lost; goes on")


# Disks that are full, read-only or none


@contextmanager
def small_disk(path, **options):
    """Mount a disk in memory at ``path``, as ``size="4m"`` or ``nr_inodes=20``."""
    path.mkdir()
    words = ",".join(f"{name}={value}" for name, value in options.items())
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", words, "none", path], capture_output=True, check=False)
    if mounted.returncode:
        cannot(f"mounting a small disk is not permitted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def remount(disk, mode):
    """Mount ``disk`` again as ``ro`` or ``rw``: once no file of it is being written, else the kernel calls it busy."""
    for _ in range(200):
        done = subprocess.run(["mount", "-o", f"remount,{mode}", disk], capture_output=True, text=True, check=False)
        if "busy" not in done.stderr:
            break
        time.sleep(0.05)
    assert done.returncode == 0, done.stderr


def save_bytes(folder, step, size, files=None):
    """Save a checkpoint with ``size`` bytes of tensors, and state that says its step."""
    saver = Saver(folder / FOLDER, files=files)
    saver.save(step, {"model": {"weight": torch.full((size,), step % 251, dtype=torch.uint8)}}, state(step))
    saver.wait()


def all_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path):
    random, count = draw("D1"), amount(20)
    with small_disk(tmp_path / "disk", size="4m") as disk:
        save_bytes(disk, 10, 5 << 19)
        before = all_files(disk)
        for step in range(20, 20 + count):
            size, at = random.randrange(1 << 19, 3 << 20), os.statvfs(disk)
            with pytest.raises(CheckpointError) as refused:
                save_bytes(disk, step, size)
            needed, free = size + (1 << 20), at.f_bavail * at.f_frsize
            told = f"{disk / FOLDER}: disk: a checkpoint needs {needed:,} bytes and {free:,} are free; the checkpoints"
            assert str(refused.value).startswith(told)
            assert all_files(disk) == before
        assert newest_whole(disk / FOLDER)[0].step == 10
    report("D1 no room on the disk", count, "refused with the bytes needed and free; the checkpoint there is untouched")


class Optimistic(Files):
    """Believes that there is room, as where others fill the disk meanwhile."""

    def free_bytes(self, path):
        return 1 << 60


def test_a_disk_that_fills_up_meanwhile_costs_nothing_but_the_new_checkpoint(tmp_path):
    random, count = draw("D2"), amount(20)
    with small_disk(tmp_path / "disk", size="4m") as disk:
        save_bytes(disk, 10, 5 << 19)
        before = all_files(disk)
        for step in range(20, 20 + count):
            with pytest.raises(CheckpointError, match=rf"^{disk}.*: disk: No space left on device \(on rank 0\)"):
                save_bytes(disk, step, random.randrange(3 << 19, 3 << 20), Optimistic())
            assert all_files(disk) == before
        save_bytes(disk, 100, 1 << 18, Optimistic())
        assert newest_whole(disk / FOLDER)[0].step == 100
    report("D2 disk full while writing", count, "told with path and reason; what was begun is gone, the old one stays")


def test_a_disk_that_can_hold_no_more_files_costs_nothing_but_the_new_checkpoint(tmp_path):
    def save_on_and_on(disk):
        for step in range(20, 60, 10):
            save_bytes(disk, step, 1 << 18)

    limits = (8, 9, 10, 11, 12) if ALL else (10,)
    for inodes in limits:
        with small_disk(tmp_path / f"disk {inodes}", size="4m", nr_inodes=inodes) as disk:
            save_bytes(disk, 10, 1 << 18)
            before = all_files(disk)
            with pytest.raises(CheckpointError, match=r"disk: No space left on device \(on rank 0\)"):
                save_on_and_on(disk)
            assert before.items() <= all_files(disk).items()
            assert not list((disk / FOLDER).glob(".tmp-*"))
            assert newest_whole(disk / FOLDER)[0].step >= 10
    report("D3 no more files on the disk", len(limits), "as D2")


def test_a_disk_that_becomes_read_only_is_named_and_holds_what_it_held(tmp_path):
    with small_disk(tmp_path / "disk", size="4m") as disk:
        save(disk, 10)
        remount(disk, "ro")
        with pytest.raises(CheckpointError, match=r"disk: Read-only file system \(on rank 0\)"):
            save(disk, 20)
        assert newest(disk) == 10
        remount(disk, "rw")
        save(disk, 20)
        assert newest(disk) == 20
    report("D4 read-only disk", 1, "told with path and reason; saving goes on when it can be written again")


def run_until_the_disk_fails(disk, fail, capsys):
    """Train on ``disk``, which fails after step 7; return the one line that the run says."""

    def hook(run, info):
        if info.step == 7:
            fail()

    recipe = replace(tiny.recipe, hooks=lambda cfg: [hook])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(recipe, ["--max-steps", "30", "--log-every", "1", "--checkpoint-every", "2", "--out", str(disk / "run")])
    assert ended.value.code == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_a_run_whose_disk_fails_ends_with_one_line_and_goes_on_when_it_is_mended(tmp_path, capsys):
    main(tiny.recipe, ["--max-steps", "30", "--log-every", "1", "--out", str(tmp_path / "whole")])
    with small_disk(tmp_path / "disk", size="2m") as disk:

        def fill():
            with suppress(OSError):
                (disk / "others").write_bytes(bytes(2 << 20))

        said = run_until_the_disk_fails(disk, fill, capsys)
        assert "No space left on device" in said or "are free" in said
        assert not list(disk.glob("run/*.draft"))
        (disk / "others").unlink()
        said = run_until_the_disk_fails(disk, lambda: remount(disk, "ro"), capsys)
        assert "disk: Read-only file system" in said
        assert "exit.json could not be written: Read-only file system" in said
        remount(disk, "rw")
        main(tiny.recipe, ["--max-steps", "30", "--log-every", "1", "--out", str(disk / "run")])
        for name in ("metrics.jsonl", "model.safetensors"):
            assert (disk / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    report(
        "D2, D4 a run whose disk fills up, and becomes read-only", 2, "one line, exit code 3; it goes on when mended"
    )


def test_a_disk_without_room_for_the_export_ends_the_run_with_3(tmp_path, capsys, monkeypatch):
    def full(draft, path, files=None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("scaletrain.checkpoint.export.put_in_place", full)
    with pytest.raises(SystemExit) as ended:
        main(tiny.recipe, ["--max-steps", "3", "--out", str(tmp_path / "run")])
    assert ended.value.code == 3
    assert "model.safetensors: disk: No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob(".*draft"))
    monkeypatch.undo()
    assert main(tiny.recipe, ["--max-steps", "3", "--out", str(tmp_path / "run")]).step == 3


def test_what_is_no_folder_is_neither_read_nor_written_as_one(tmp_path):
    kinds = {
        "file": lambda path: path.write_text("mine"),
        "link": lambda path: path.symlink_to(tmp_path),
        "link to nothing": lambda path: path.symlink_to("nowhere"),
        "FIFO": os.mkfifo,
    }
    for kind, make in kinds.items():
        path = tmp_path / kind / FOLDER
        path.parent.mkdir()
        make(path)
        with pytest.raises(CheckpointError, match=f"{path}: folder: .*; a plain folder is expected"):
            find(path.parent, "auto", None, True)
        with pytest.raises(CheckpointError, match=f"{path}: folder: .*; a plain folder is expected"):
            save(path.parent, 10)
        assert [other.name for other in tmp_path.glob("*/*")] == [FOLDER] * len(list(tmp_path.iterdir()))
    report("D4 checkpoints is a file, a link, a FIFO", 2 * len(kinds), "refused at the start and when saving, at once")


def test_a_folder_that_may_not_be_written_or_read_is_refused_with_the_reason(memory):
    run, folder = memory / "run", memory / "run" / FOLDER

    def try_it(work, *arguments):
        ((code, said),) = on_ranks(1, as_nobody, work, run, *arguments, folder=memory)
        assert code == 0
        return said

    run.mkdir(mode=0o555)
    assert try_it(save, 10).startswith(f"{folder}: disk: Permission denied (on rank 0)")
    run.chmod(0o755)
    save(run, 10)
    folder.chmod(0)
    assert try_it(newest) == f"{folder}: folder: Permission denied; a plain folder is expected"
    folder.chmod(0o555)
    assert "disk: Permission denied (on rank 0)" in try_it(save, 20)
    assert newest(run) == 10
    folder.chmod(0o755)
    report("D4 permission denied", 3, "refused with path and reason")


def test_a_run_folder_may_be_a_link_to_another_disk(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to("scratch")
    save(tmp_path / "run", 10)
    assert newest(tmp_path / "scratch") == 10


def test_files_and_folders_get_the_modes_that_the_umask_leaves(tmp_path):
    masks = (0o022, 0o027, 0o077, 0o007)
    for umask in masks:
        folder = tmp_path / f"{umask:03o}"
        folder.mkdir()
        before = os.umask(umask)
        try:
            save(folder, 10)
            export(open_checkpoint(folder / FOLDER / step_folder(10)), folder / WEIGHTS)
        finally:
            os.umask(before)
        made = list(folder.rglob("*"))
        assert len(made) == 7
        for path in made:
            full = 0o777 if path.is_dir() else 0o666
            assert stat.S_IMODE(path.stat().st_mode) == full & ~umask, path
    report("D7 umask", len(masks), "files have 0666 and folders 0777 without its bits, exported weights as well")
