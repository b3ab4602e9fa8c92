"""What every workflow step does around its own work: one writer at a time, final metrics on disk, a tracked run."""

import argparse
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdtp.disk import remove_temporaries
from sdtp.pipeline.files import canonical_json, write_atomically
from sdtp.pipeline.gpu_meter import GpuMeter, leased
from sdtp.pipeline.locks import only_writer
from sdtp.pipeline.provenance import inputs
from sdtp.pipeline.resources import resources_file
from sdtp.pipeline.tracking import TrackedRun, open_run

logger = logging.getLogger(__name__)

# What the step itself adds to the metrics file.
RESERVED = ("wall_seconds", "device", "peak_rss_bytes", "peak_cuda_bytes")
# Seconds within which SIGTERM that comes again is still the first one.
SAME_SIGNAL = 5.0


class StepLog:
    """What a step reports while it runs: to the tracker at once, and at the end to the metrics file."""

    def __init__(self, tracked: TrackedRun) -> None:
        self.final: dict[str, float] = {}
        self._tracked = tracked
        self._not_finite: set[str] = set()

    def metric(self, name: str, value: float, step: int | None = None) -> None:
        """Reports one number. With `step` it is a point of a curve (tracker only), without it a final result of the
        step, which also goes to the metrics file.

        A NaN or an infinity is warned of, once a name, and kept from the tracker, which would store 1.8e308 for it and
        call that the best run. Raises ValueError for a final metric under a name the step itself uses (`RESERVED`).
        """
        value = float(value)
        if step is None:
            if name in RESERVED:
                raise ValueError(
                    f"metric {name!r}: the step writes this one itself; names taken: {', '.join(RESERVED)}"
                )
            self.final[name] = value
        if math.isfinite(value):
            self._tracked.metric(name, value, step)
        elif name not in self._not_finite:
            at = "" if step is None else f" at step {step}"
            logger.warning("metric %r is %s%s: such values are kept from the tracker", name, value, at)
            self._not_finite.add(name)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """`metric` for each item of `values`."""
        for name, value in values.items():
            self.metric(name, value, step)

    def dataset(self, name: str, path: str | Path, digest: str, revision: str | None = None) -> None:
        """Records a data set the step reads: its content hash `digest`, and the hub `revision` where it has one."""
        self._tracked.dataset(name, path, digest, revision)

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copies a file or a folder to the tracker now, under `folder` there (for example "checkpoints/step-20")."""
        self._tracked.artifact(path, folder)

    def latest_artifacts(self, folder: str, count: int) -> None:
        """Removes from the tracker's `folder` all but its last `count` entries, in the order of their names."""
        self._tracked.latest_artifacts(folder, count)

    def register(self, name: str, model: Path, pruner: Path, evidence: Mapping[str, Any]) -> None:
        """Registers a trained pruner in the tracker's model registry, see `registry.register`."""
        self._tracked.register(name, model, pruner, evidence)

    @property
    def run_id(self) -> str:
        """Id of the tracked run; empty where the step is not tracked."""
        return self._tracked.run_id


@contextmanager
def step(
    name: str,
    args: argparse.Namespace,
    outputs: Sequence[str | Path],
    wildcards: Mapping[str, str | int | float] | None = None,
    *,
    times: bool = False,
) -> Iterator[StepLog]:
    """Runs one workflow step: `with step("train", args, outputs=[args.output]) as log: ...`.

    args: the parsed command line; `args.settings` (JSON text) is logged as parameters, hashes of the files and folders
        that other arguments name as tags (see `provenance.inputs`), and `args.metrics`, where the
        step has it, names the file that gets the final metrics, the wall seconds, the device and the peak memory in
        bytes (JSON, flat; null for a number that is not finite). It is written only when the block ends well.
    outputs: what the step writes; a lock beside the first one refuses a second writer. Of a folder that other steps
        write to as well, the files that are this one's are named too.
    wildcards: what tells this job from the others of its rule.
    times: whether the step takes times that are reported, so that nothing may look at its GPUs meanwhile.

    Raises UserError where another process is writing the same output, or where the tracking URI is one MLflow cannot
    use. The tracked run ends as FINISHED, as FAILED after an exception, as KILLED after SIGINT or SIGTERM; SIGTERM then
    goes on to the handler that was there before. Anything else that fails in the tracker is a warning, never an error.
    """
    with only_writer(Path(outputs[0])), _sigterm_raises():
        output, metrics_file = Path(outputs[0]), getattr(args, "metrics", None)
        for path in (*map(Path, outputs), *([Path(metrics_file)] if metrics_file else [])):
            remove_temporaries(path)  # of a writer that was killed
        held = _HeldSignals()  # a run that is half opened could not be closed
        try:
            tracked = open_run(
                name,
                dict(wildcards or {}),
                args.settings,
                output,
                inputs(vars(args), outputs),
                resources_file(metrics_file and Path(metrics_file), output, name),
            )
        except BaseException:
            held.release()
            raise
        started = time.monotonic()
        status = "FAILED"
        meter = GpuMeter(leased() if tracked.is_told and not times else [])
        try:
            held.release()
            log = StepLog(tracked)
            with meter.running():
                yield log
            usage = {"wall_seconds": round(time.monotonic() - started, 3), **_peak_memory()}
            if metrics_file:
                finite = {key: value if math.isfinite(value) else None for key, value in log.final.items()}
                with write_atomically(metrics_file) as temporary:
                    temporary.write_text(canonical_json({**finite, **usage, "device": _device()}) + "\n", "utf-8")
            for key, value in usage.items():
                tracked.metric(key, value, None)
            status = "FINISHED"
        except (KeyboardInterrupt, _Terminated):
            status = "KILLED"
            raise
        finally:
            tracked.points(meter.points())
            tracked.tags({"sdtp.device": _device()})
            tracked.close(status)


class _HeldSignals:
    """Keeps SIGINT and SIGTERM that Python handles, in the main thread, until they are let go."""

    def __init__(self) -> None:
        self._came: list[int] = []
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if callable(before):
                    self._before[number] = before
                    signal.signal(number, lambda number, frame: self._came.append(number))

    def release(self) -> None:
        """Handles what came as it would have been."""
        for number, before in self._before.items():
            signal.signal(number, before)
        for number in self._came:
            os.kill(os.getpid(), number)


class _Terminated(BaseException):
    """SIGTERM, as an exception: unwinds the step's own context managers first."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets SIGTERM unwind the block, then hands the signal to whatever handled it before."""
    previous = signal.getsignal(signal.SIGTERM)
    in_main_thread = threading.current_thread() is threading.main_thread()
    # None: a handler not set from Python, which could not be put back.
    if not in_main_thread or previous is None or previous is signal.SIG_IGN:
        yield
        return

    told: list[float] = []

    def terminate(number: int, frame: object) -> None:
        told.append(time.monotonic())
        if len(told) == 1:
            raise _Terminated
        # One that tells a whole group of processes, and one of them that passes it on, do not mean it twice; a second
        # signal after that does not wait for the clean-up.
        if told[-1] - told[0] > SAME_SIGNAL:
            signal.signal(signal.SIGTERM, previous)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _Terminated:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signal.SIGTERM, previous)
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(128 + signal.SIGTERM) from None  # reached where the previous handler returns
    finally:
        signal.signal(signal.SIGTERM, previous)


def _peak_memory() -> dict[str, int]:
    """Peak resident bytes of this process and, where CUDA was used, peak allocated bytes over its devices, summed."""
    peak = {"peak_rss_bytes": _peak_rss()}
    torch = sys.modules.get("torch")  # a step that never imported it used no device
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        peak["peak_cuda_bytes"] = sum(torch.cuda.max_memory_allocated(device) for device in devices)
    return peak


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage also counts what this process was before exec, up to a copy of the whole Snakemake process.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return "cpu"
