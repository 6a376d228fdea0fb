"""Two processes that share the work: what scaletrain adds to DistributedDataParallel, and how many bytes it sends.

    python -m benchmarks.two_processes [--rounds 9] [--steps 12] [--out FILE]

torchrun starts two processes, each with one thread on a core of its own, that exchange gradients by gloo. A CNN has
much to compute and 2 MB of gradients; an MLP has 20 MB of them and little to compute. The global batch is the same in
every row, in one micro-batch a process or in eight. The efficiency is the time of the raw loop on one process with one
thread (the other waits) over twice that of two. In the first round, which is not timed, a communication hook adds up
the bytes of every bucket that is averaged, and /proc/self/io the bytes that all system calls of the process write,
sockets' first of all. At the end of every round both ranks must have the same weights, and so must all loops.
"""

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from benchmarks.loops import AGAIN, OURS, RAW, Job, loops_here, raw
from benchmarks.pairs import Rounds, aims, conditions, run_rounds
from recipes import cnn
from recipes.models import mlp
from scaletrain import Config, Data, Recipe, constant

WORLD_SIZE, WARMUP = 2, 3
ALONE = "raw loop, one process"
MICRO_BATCHES = (1, 8)


def images(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(n, 3, 32, 32, generator=generator),
        "label": torch.randint(10, (n,), generator=generator),
    }


def rows(n: int, features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(n, features, generator=generator), "y": torch.randint(10, (n,), generator=generator)}


def much_to_compute(toy: bool) -> tuple[Recipe, Config]:
    columns = images(64 if toy else 2048)
    data = partial(Data, columns, classes=[str(i) for i in range(10)])
    recipe = replace(cnn.recipe, data=lambda cfg: data(), augment=None, schedule=constant)
    return recipe, cnn.CNNConfig(batch_size=32 if toy else 128, width=4 if toy else 32, dropout=0.0, threads=1)


def much_to_send(toy: bool) -> tuple[Recipe, Config]:
    features, width = (16, 64) if toy else (256, 2128)
    columns = rows(64 if toy else 8192, features)
    recipe = Recipe(
        config=Config,
        data=lambda cfg: Data(columns),
        model=lambda cfg, data: mlp(features, 10, width),
        loss=lambda model, batch, cfg: F.cross_entropy(model(batch["x"]), batch["y"]),
    )
    return recipe, Config(batch_size=32 if toy else 64, threads=1)


WORKLOADS = {"CNN": much_to_compute, "MLP": much_to_send}


@dataclass
class Loop:
    """One loop on one workload: what it costs from step ``WARMUP`` to its last, on both ranks together."""

    job: Job
    work: Callable[[Job], None]
    alone: bool = False
    rounds: int = 0
    model: nn.Module = field(default_factory=nn.Identity)
    cpu_seconds: list[float] = field(default_factory=list)
    bucket_bytes: int = 0
    written_bytes: int = 0
    weights: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __call__(self) -> float:
        """Train once; return the seconds of the slower rank."""
        begin_alike()
        self.marks: list[tuple[float, float, int]] = []
        self.sent = 0
        if not self.alone or dist.get_rank() == 0:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.work(replace(self.job, note=self.note, built=self.built))
        else:
            self.marks = [(0.0, 0.0, 0)] * self.job.cfg.max_steps
        (began, cpu_began, wrote_before), (ended, cpu_ended, wrote) = self.marks[WARMUP - 1], self.marks[-1]
        if self.rounds == 0:
            self.bucket_bytes, self.written_bytes = self.sent, wrote - wrote_before
        else:
            self.cpu_seconds.append(total(cpu_ended - cpu_began))
        self.rounds += 1
        self._compare_ranks()
        return largest(ended - began)

    def note(self, step: int) -> None:
        if step in (WARMUP, self.job.cfg.max_steps):
            self.marks.append((time.perf_counter(), time.process_time(), written_by_process()))
        else:
            self.marks.append(self.marks[-1] if self.marks else (0.0, 0.0, 0))
        if step == WARMUP:
            self.sent = 0

    def built(self, model: nn.Module) -> None:
        self.model = model
        if self.rounds == 0 and isinstance(model, DistributedDataParallel):
            model.register_comm_hook(None, self._count)

    def _count(self, state: object, bucket: dist.GradBucket) -> Future[Tensor]:
        self.sent += bucket.buffer().nbytes
        return allreduce_hook(dist.group.WORLD, bucket)

    def _compare_ranks(self) -> None:
        if not self.alone:
            self.weights = torch.cat([p.detach().flatten() for p in self.model.parameters()])
            of_first = self.weights.clone()
            dist.broadcast(of_first, src=0)
            if any_of(not torch.equal(of_first, self.weights)):
                raise SystemExit("the ranks ended with other weights")


Cases = dict[tuple[str, int], tuple[dict[str, Loop], Rounds]]
"""What was measured of each workload and number of micro-batches."""


def begin_alike() -> None:
    torch.set_num_threads(1)
    dist.barrier()


def any_of(true: bool) -> bool:
    return largest(float(true)) > 0


def largest(value: float) -> float:
    return reduced(value, dist.ReduceOp.MAX)


def total(value: float) -> float:
    return reduced(value, dist.ReduceOp.SUM)


def reduced(value: float, how: dist.ReduceOp.RedOpType) -> float:
    one = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(one, op=how)
    return float(one)


def written_by_process() -> int:
    """Return the bytes given to write and writev so far: to files and, by gloo, to sockets (Linux)."""
    file = Path("/proc/self/io")
    return int(file.read_text().split("wchar:")[1].split()[0]) if file.exists() else 0


def measure(workload: str, micro_batches: int, args: argparse.Namespace) -> tuple[dict[str, Loop], Rounds]:
    recipe, cfg = WORKLOADS[workload](args.toy)
    cfg = replace(cfg, max_steps=WARMUP + args.steps, precision="fp32", out=str(args.folder / "run"))
    share = cfg.batch_size // WORLD_SIZE // micro_batches
    of_two = Job(
        recipe, replace(cfg, micro_batch_size=share), print, print, rank=dist.get_rank(), world_size=WORLD_SIZE
    )
    of_one = Job(recipe, replace(cfg, micro_batch_size=WORLD_SIZE * share), print, print)
    loops = {name: Loop(of_two, without_old_run(work)) for name, work in loops_here().items()}
    loops[ALONE] = Loop(of_one, raw, alone=True)
    rounds = run_rounds(dict(loops), args.rounds, any_of=any_of)
    for name, loop in loops.items():
        if not loop.alone and any_of(not torch.equal(loop.weights, loops[RAW].weights)):
            raise SystemExit(f"{name} did not end with the raw loop's weights: not the same work")
    return loops, rounds


def without_old_run(work: Callable[[Job], None]) -> Callable[[Job], None]:
    """Let every rank begin when the run folder of the round before is gone."""

    def begun(job: Job) -> None:
        if job.rank == 0:
            shutil.rmtree(job.cfg.out, ignore_errors=True)
        dist.barrier()
        work(job)

    return begun


def cpu_of(loops: dict[str, Loop]) -> Rounds:
    """Return the CPU seconds as rounds to compare: on a busy machine they say more than the clock."""
    return Rounds({name: loop.cpu_seconds for name, loop in loops.items()}, {})


def table(loops: dict[str, Loop], rounds: Rounds, steps: int) -> list[str]:
    cpu = cpu_of(loops)
    heads = ["loop", "ms per step", "/ raw (95 % interval)", "CPU ms, both ranks", "/ raw (95 % interval)"]
    lines = [f"| {' | '.join([*heads, 'efficiency', 'MB per step'])} |", "|---" * (len(heads) + 2) + "|"]
    for name in [ALONE, *(name for name in loops if name != ALONE)]:
        loop, cells = loops[name], [name]
        for found in (rounds, cpu):
            ratio, low, high = found.ratio(name, RAW)
            cells += [
                f"{statistics.median(found.seconds[name]) / steps * 1e3:.1f}",
                f"{ratio:.3f} ({low:.3f}-{high:.3f})",
            ]
        sent = f"{loop.bucket_bytes / steps / 1e6:.2f} ({loop.written_bytes / steps / 1e6:.2f})"
        cells += ["", ""] if loop.alone else [f"{rounds.ratio(ALONE, name)[0] / WORLD_SIZE:.2f}", sent]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds")
    parser.add_argument("--steps", type=int, default=12, help="timed optimizer steps per loop and round")
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}"]
            command = [sys.executable, *torchrun, "-m", "benchmarks.two_processes", *sys.argv[1:], "--folder", folder]
            raise SystemExit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)
    dist.init_process_group("gloo")
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})
    torch.set_flush_denormal(True)
    load = Path("/proc/loadavg").read_text().split()[0]
    cases = {(w, n): measure(w, n, args) for w in WORKLOADS for n in MICRO_BATCHES}
    if dist.get_rank() == 0:
        write(report(cases, args, load), args.out)


def report(cases: Cases, args: argparse.Namespace, load: str) -> list[str]:
    command = f"python -m benchmarks.two_processes --rounds {args.rounds} --steps {args.steps}"
    lines = ["# Two processes that share the work", "", *conditions(command + (" --toy" if args.toy else ""))]
    lines += [
        f"* 2 processes by torchrun and gloo, a core and a thread each; load {load} before, as the rounds went: "
        f"{', '.join(f'{r.load[0]} to {r.load[-1]}' for _, r in cases.values())}",
        f"* {args.rounds} rounds of {args.steps} steps after {WARMUP} unnoticed ones, loops in random order; "
        f"{sum(r.dropped for _, r in cases.values())} rounds dropped for steal",
        "* weights after every round bit-equal on both ranks, and in all loops on two processes",
        "* MB per step: of the buckets that a rank averages; in brackets all that its system calls wrote",
        "* the raw loop again is the noise: a difference smaller than its own is no claim, whether met or missed",
    ]
    for (workload, micro_batches), (loops, rounds) in cases.items():
        job = loops[RAW].job
        size = sum(p.numel() for p in loops[RAW].model.parameters())
        lines += ["", f"## {workload}, {size * 4 / 1e6:.1f} MB of gradients, batch {job.cfg.batch_size} = 2 x "]
        lines[-1] += f"{job.cfg.micro_batch_size} x {micro_batches} (processes x micro-batch x count)"
        lines += ["", *table(loops, rounds, args.steps)]
    lines += ["", *aims("Aims", *found(cases, args.steps)), "", "Raw ms per step, round by round:", ""]
    for (workload, micro_batches), (_, rounds) in cases.items():
        for name, seconds in rounds.seconds.items():
            lines.append(f"* {workload} x {micro_batches}, {name}: {[round(s / args.steps * 1e3, 2) for s in seconds]}")
    return lines


def found(cases: Cases, steps: int) -> list[tuple[bool, str]]:
    """Return the aims: as fast as the raw loop, and as many bytes, which do not depend on the micro-batches."""
    speeds = []
    for (workload, micro_batches), (loops, rounds) in cases.items():
        said = [f"{workload} x {micro_batches}:"]
        for name in (OURS, AGAIN):
            ratio, low, high = rounds.ratio(RAW, name)
            of_cpu, cpu_low, cpu_high = cpu_of(loops).ratio(name, RAW)
            said += [f"{name} {ratio:.3f} ({low:.3f}-{high:.3f}) of the raw loop's speed"]
            said += [f"with {of_cpu:.3f} ({cpu_low:.3f}-{cpu_high:.3f}) of its CPU time;"]
        speeds.append((rounds.ratio(RAW, OURS)[0] >= 0.98, f"{' '.join(said)} at least 0.98"))
    sent = []
    for workload in WORKLOADS:
        ours = [cases[workload, n][0][OURS].bucket_bytes // steps for n in MICRO_BATCHES]
        wanted = cases[workload, 1][0][RAW].bucket_bytes // steps
        said = f"{workload}: {ours[0]:,} bytes per step in 1 micro-batch, {ours[1]:,} in 8, raw {wanted:,}"
        sent.append((ours == [wanted, wanted], f"{said}: 8 send an eighth per micro-batch"))
    return [*speeds, *sent]


def write(lines: list[str], out: Path | None) -> None:
    print("\n".join(lines))
    if out:
        out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
