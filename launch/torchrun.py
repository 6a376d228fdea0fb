"""Be torchrun for a recipe: read launch/torchrun.sh's variables, say in one line what failed, end as the run did."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

USAGE = "usage: launch/torchrun.sh RECIPE [options]"
FAILED, INPUT, PREEMPTED, INTERRUPTED = 1, 2, 75, 130  # as in scaletrain/errors.py
HOME = Path(__file__).resolve().parent.parent
CONNECT_SECONDS, ANSWER_SECONDS = 5, 30
HEARTBEAT_SECONDS, BEATS = 5, 6
"""A machine that is silent for so many beats is lost; one that was only slow would go on beside the others."""


def main() -> None:
    """Join the other machines, train, and end with the exit code of the run."""
    # until the processes are there, nothing is lost; and the first process of a container has no handler by default
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(PREEMPTED))
    file, options = recipe_file(sys.argv[1:]), sys.argv[2:]
    folder = run_folder(options, os.environ)
    if folder is None and setting("RESTARTS", 3) > 0:
        end(INPUT, "what is started again needs the same folder each time: give --out or set SCALETRAIN_OUT")
    words = [*agent_options(os.environ, folder), str(file), *options]
    if config := os.environ.get("CONFIG"):
        os.environ.update(exports(config, file))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun would set, with a warning; the run chooses
    # by default an agent keeps the address of the first round's rank 0, which the next round may no longer have
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    before = outcome(folder)
    code, problem = be_torchrun(words)
    said = outcome(folder)
    if code == 0:
        return
    if said is not None and said != before and said[0] != 0:  # torchrun makes 1 of every code
        sys.exit(said[0])
    end(code, problem) if problem else sys.exit(code)


def be_torchrun(words: Sequence[str]) -> tuple[int, str]:
    """Run torchrun's agent; return an exit code, and what went wrong between the machines."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import (
        RendezvousClosedError,
        RendezvousConnectionError,
        RendezvousTimeoutError,
    )
    from torch.distributed.run import parse_args, run

    args = parse_args(list(words))
    meeting = f"{args.rdzv_endpoint} (HEAD)"
    if is_foreign(args.rdzv_endpoint):
        return FAILED, f"{meeting} is taken by a program that is no meeting point of a run; choose another port"
    try:
        run(args)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return FAILED, ""
    except SignalException as told:
        return INTERRUPTED if told.sigval == signal.SIGINT else PREEMPTED, ""
    except RendezvousTimeoutError:
        return FAILED, (
            f"{meeting}: fewer than {args.nnodes.split(':')[0]} machines (NODES) came within {wait()} s (WAIT); "
            f"start the same command on the others, with the same HEAD, NODES and ID ({args.rdzv_id})"
        )
    except RendezvousClosedError:
        return FAILED, f"{meeting}: the run '{args.rdzv_id}' has ended on the other machines; start it there again too"
    except RendezvousConnectionError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        return FAILED, (
            f"{meeting} does not answer as the meeting point of a run within {wait()} s ({why}); it must be the "
            "machine whose command was started first, with a port that no other program has"
        )
    return 0, ""


def is_foreign(endpoint: str) -> bool:
    """Whether another program listens where the machines are to meet: torchrun would wait for its answer for ever."""
    from torch.distributed import TCPStore

    host, _, port = endpoint.rpartition(":")
    answers: list[bool] = []

    def ask() -> None:
        with suppress(RuntimeError, TimeoutError):  # no store is made of what closes the connection
            TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=wait()))
            answers.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    deadline = time.monotonic() + min(wait(), ANSWER_SECONDS)
    while listens(host, int(port)):  # else nobody is there yet, or any more
        if asking.ident is None:
            asking.start()
        asking.join(1)
        if answers or time.monotonic() > deadline:
            return not answers
    return False


def listens(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    with suppress(OSError):
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        return True
    return False


def agent_options(env: Mapping[str, str], folder: Path | None) -> list[str]:
    """Translate our variables into torchrun's options."""
    nodes = env.get("NODES") or "1"
    low, _, high = nodes.partition(":")
    if not (low.isdigit() and (high or low).isdigit() and 1 <= int(low) <= int(high or low)):
        end(INPUT, f"NODES={nodes}: expected a number of machines, or MIN:MAX")
    head = env.get("HEAD") or ("localhost:0" if high in ("", "1") and low == "1" else "")
    if not head.rpartition(":")[2].isdigit():
        end(INPUT, f"HEAD={head}: expected HOST:PORT, the same on all {nodes} machines, as node1:29400")
    beats = f"keep_alive_interval={HEARTBEAT_SECONDS},keep_alive_max_attempt={BEATS}"
    words = [
        f"--nnodes={nodes}",
        f"--nproc-per-node={processes()}",
        f"--max-restarts={setting('RESTARTS', 3)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={head}",
        f"--rdzv-id={env.get('ID') or (folder.name if folder else 'scaletrain')}",
        f"--rdzv-conf=join_timeout={wait()},read_timeout={wait()},{beats},{env.get('RENDEZVOUS', '')}".rstrip(","),
        f"--shutdown-timeout={setting('GRACE', 30)}",
    ]
    return words + ([f"--local-addr={env['ADDRESS']}"] if env.get("ADDRESS") else [])


def processes() -> int:
    """Return how many processes this machine gets; without GPUs, ask for the CPU."""
    import torch

    found = torch.accelerator.device_count()
    gpus = setting("GPUS", found)
    if gpus > found:
        end(INPUT, f"GPUS={gpus}: this machine has {found}; for processes on the CPU: GPUS=0 PROCESSES=N")
    if gpus == 0:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        return setting("PROCESSES", 1, least=1)
    return gpus


def wait() -> int:
    """Return how many seconds to wait for the other machines."""
    return setting("WAIT", 600, least=1)


def setting(name: str, default: int, least: int = 0) -> int:
    """Return a variable's whole number."""
    text = os.environ.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        end(INPUT, f"{name}={text}: expected a whole number, {least} or more")
    return int(text)


def recipe_file(words: Sequence[str]) -> Path:
    """Return the file of a recipe that is named, or given by its path."""
    recipes = sorted(path for path in (HOME / "recipes").glob("*.py") if "__main__" in path.read_text())
    names = " ".join(path.stem for path in recipes)
    if not words:
        end(INPUT, f"{USAGE}; recipes: {names}")
    for path in (HOME / "recipes" / f"{words[0].removesuffix('.py')}.py", Path(words[0])):
        if path.suffix == ".py" and path.is_file():
            return path
    return end(INPUT, f"no recipe '{words[0]}'; there are: {names}")


def run_folder(options: Sequence[str], env: Mapping[str, str]) -> Path | None:
    """Return the folder that the recipe is told to use."""
    given = env.get("SCALETRAIN_OUT")
    for word, following in zip(options, [*options, ""][1:], strict=True):
        name, equals, value = word.partition("=")
        if name == "--out":
            given = value if equals else following
    return Path(given) if given else None


def outcome(folder: Path | None) -> tuple[int, int] | None:
    """Return the exit code that a run left in its folder, and which file says so."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        file = (folder or Path("/dev/null")) / "exit.json"
        return int(json.loads(file.read_text())["code"]), file.stat().st_mtime_ns
    return None


def exports(config: str, file: Path) -> dict[str, str]:
    """Return the variables that accelerate launch would set for a file of accelerate_configs/."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = HOME / "accelerate_configs" / f"{config}.yaml"
    if not path.is_file():
        end(INPUT, f"CONFIG={config}: there is no {path}")
    one = ["--num_machines", "1", "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), *one, str(file)])
    )
    env = prepare_multi_gpu_env(args)
    return {name: value for name, value in env.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def end(code: int, problem: str) -> NoReturn:
    """Say in one line what is wrong, and leave."""
    print(f"error: {problem}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
