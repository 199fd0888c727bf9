"""Feed the package thousands of damaged and hostile inputs (`make fuzz`). fuzz_inputs.py lists the kinds.

    python tests/stress/fuzz.py [--count 10000] [--seed 0] [--kinds checkpoints images …] [--only KIND/INDEX]

Every input must end in a result or in an error of this package that says what is wrong, within limits of time and
memory. Where the right result is known (fuzz_twins.py), another result counts as a finding. Nothing in an input may be
executed: an audit hook watches for new processes and network addresses, and no file may be left behind in a temporary
home and work folder. Inputs run in a forked process, so that a crash does not end the run. KIND/INDEX and the seed
repeat an input.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.font_manager  # noqa: F401  (starts a process to list fonts)

import t2t_vit
from t2t_vit.data import DataError
from t2t_vit.models.safe_load import CheckpointError
from t2t_vit.settings import UsageError

PACKAGE = str(Path(t2t_vit.__file__).parent)
OURS = (UsageError, DataError, CheckpointError)
CAUGHT = (ValueError, OSError, FloatingPointError)  # the command line prints these as one line
# inputs per kind, in proportion; a configuration takes half a second
SHARES = {'checkpoints': 8, 'images': 6, 'sources': 3, 'configs': 3, 'exported': 3}
SECONDS = 10.0  # CPU time of one input
PATIENCE = 120.0  # seconds after which an input counts as hanging
MEMORY = 1 << 30  # bytes that an input may add to the process
CEILING = 6 << 30  # bytes of address space, beyond which allocations fail
LONGEST = 5000  # characters of a message
FORBIDDEN = (
    'os.system',
    'os.exec',
    'os.spawn',
    'os.posix_spawn',
    'os.fork',
    'os.forkpty',
    'pty.spawn',
    'subprocess.Popen',
    'socket.connect',
    'socket.getaddrinfo',
    'urllib.Request',
    'shutil.rmtree',
    'webbrowser.open',
    'ftplib.connect',
    'ctypes.dlopen',
)


class Case(NamedTuple):
    """One input: what was done to it, how to use it, which files it may leave, and which result is right."""

    what: str
    use: Callable[[], object]
    leaves: tuple[str, ...] = ()
    expected: str | None = None  # the only result allowed, if known
    refusable: bool = True  # an error is allowed instead


Maker = Callable[[random.Random, Path], Case]  # writes an input into an empty folder


class Outcome(NamedTuple):
    """How an input ended: `fine`, `refused`, or a finding.

    Findings: `changed` (a wrong result), `leaked` (an error of another package), `executed`, `left`, `slow`, `large`,
    `died`.
    """

    status: str
    what: str
    message: str
    seconds: float = 0.0
    megabytes: float = 0.0


class Watch:
    """Record forbidden events through an audit hook while armed. A hook stays as long as its process."""

    def __init__(self) -> None:
        self.armed, self.seen = False, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if self.armed and event in FORBIDDEN:
            self.seen.append(f'{event} {args!r}'[:300])


def tree(*folders: Path) -> set[str]:
    return {str(path) for folder in folders for path in folder.rglob('*')}


def peak() -> int:
    """Return the peak of resident memory since `forget_peak`, in bytes."""
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM'))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    Path('/proc/self/clear_refs').write_text('5')
    return peak()


def ours(error: BaseException) -> bool:
    """Return whether this package raised an error on purpose: by its class, or by a `raise` in its code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = last.filename.startswith(PACKAGE) and (last.line or '').lstrip().startswith('raise ')
    return isinstance(error, OURS) or (isinstance(error, CAUGHT) and raised)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def judge(case: Case, watch: Watch, places: Sequence[Path]) -> Outcome:
    """Use an input and return how that ended."""
    before, base, start = tree(*places), forget_peak(), time.process_time()
    status, message = 'fine', ''
    watch.seen, watch.armed = [], True
    try:
        with silence():
            result = case.use()
        if case.expected is not None and result != case.expected:
            status, message = 'changed', f'{result} instead of {case.expected}'[:300]
    except BaseException as error:
        message = str(error)
        status = 'refused' if ours(error) else 'leaked'
        if status == 'leaked' or not message or len(message) > LONGEST:
            where = [f'{Path(f.filename).name}:{f.lineno}' for f in traceback.extract_tb(error.__traceback__)]
            status, message = 'leaked', f'{type(error).__name__}: {message[:300]} at {" > ".join(where[-6:])}'
        elif not case.refusable:
            status = 'changed'
    watch.armed = False
    seconds, grown = time.process_time() - start, peak() - base
    left = {path for path in tree(*places) - before if not path.endswith(case.leaves or ('/\0',))}
    if watch.seen:
        status, message = 'executed', '; '.join(watch.seen)
    elif left:
        status, message = 'left', ', '.join(sorted(left))
    elif status in ('fine', 'refused') and seconds > SECONDS:
        status, message = 'slow', f'{seconds:.1f} s; {message[:200]}'
    elif status in ('fine', 'refused') and grown > MEMORY:
        status, message = 'large', f'{grown >> 20} MiB; {message[:200]}'
    return Outcome(status, case.what, message, seconds, grown / (1 << 20))


def work(pipe: Connection, maker: Maker, kind: str, seed: int, indices: Sequence[int], room: Path) -> None:
    """Use one input after another in the forked process; report each before and after."""
    home, temporary, folder = room / 'home', room / 'tmp', room / 'case'
    os.environ.update(HOME=str(home), TMPDIR=str(temporary), XDG_CACHE_HOME=str(home / '.cache'))
    tempfile.tempdir = str(temporary)
    resource.setrlimit(resource.RLIMIT_AS, (CEILING + virtual(), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter('ignore')
    watch, nowhere = Watch(), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)  # C libraries write there
    for index in indices:
        for place in (home, temporary, folder):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
        os.chdir(folder)
        try:
            case = maker(random.Random(f'{seed}/{kind}/{index}'), folder)
        except Exception:
            pipe.send((index, Outcome('died', 'the fuzz run failed to make it', traceback.format_exc())))
            continue
        pipe.send((index, case.what))
        pipe.send((index, judge(case, watch, (home, temporary, folder))))
    pipe.send((None, None))


def virtual() -> int:
    return int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')


def run_kind(
    maker: Maker, kind: str, seed: int, indices: Sequence[int], patience: float = PATIENCE
) -> Iterator[tuple[int, Outcome]]:
    """Yield how each input of a kind ended; if the process dies or hangs, another one takes the rest."""
    context, rest = multiprocessing.get_context('fork'), list(indices)
    while rest:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as room:
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, maker, kind, seed, rest, Path(room)))
            process.start()
            theirs.close()
            what = 'nothing yet'
            while rest:
                try:
                    ended = not mine.poll(patience)
                    report = None if ended else mine.recv()[1]
                except EOFError:
                    ended = True
                if ended:
                    alive = process.is_alive()
                    process.kill()
                    process.join()
                    how = f'no end in {patience:.0f} s' if alive else f'exit code {process.exitcode}'
                    yield rest.pop(0), Outcome('died', what, how)
                    break
                if isinstance(report, Outcome):
                    yield rest.pop(0), report
                else:
                    what = report
            process.join()
            mine.close()


def fuzz(
    makers: dict[str, Maker], count: int, seed: int = 0, say: Callable[[str], None] = lambda line: None
) -> tuple[Counter, list[str]]:
    """Use `count` inputs of the given kinds in proportion to SHARES; return counts, and a line per finding."""
    ended: Counter = Counter()
    findings: list[str] = []
    total = sum(SHARES.get(kind, 1) for kind in makers)
    for kind, maker in makers.items():
        start, worst = time.monotonic(), (0.0, 0.0)
        for index, outcome in run_kind(maker, kind, seed, range(count * SHARES.get(kind, 1) // total)):
            ended[kind, outcome.status] += 1
            worst = max(worst[0], outcome.seconds), max(worst[1], outcome.megabytes)
            if outcome.status not in ('fine', 'refused'):
                findings.append(f'{kind}/{index} {outcome.status}: {outcome.what}: {outcome.message}')
                say(findings[-1])
        mine = {status: n for (name, status), n in ended.items() if name == kind}
        say(
            f'{kind}: {sum(mine.values())} inputs in {time.monotonic() - start:.0f} s, '
            f'{", ".join(f"{n} {status}" for status, n in sorted(mine.items()))}; slowest {worst[0]:.1f} s of CPU '
            f'time, largest {worst[1]:.0f} MiB'
        )
    return ended, findings


def main(argv: list[str] | None = None) -> int:
    from fuzz_inputs import KINDS, makers

    parser = argparse.ArgumentParser()
    parser.add_argument('--count', type=int, default=10_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kinds', nargs='*', choices=[*KINDS], default=[*KINDS])
    parser.add_argument('--only', help='KIND/INDEX: use one input in this process, and show its error')
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as seeds:
        if args.only:
            kind, _, index = args.only.partition('/')
            folder = Path(tempfile.mkdtemp())
            os.chdir(folder)
            case = makers(Path(seeds), [kind])[kind](random.Random(f'{args.seed}/{kind}/{index}'), folder)
            print(folder, case.what, flush=True)
            print(case.use())
            return 0
        ended, findings = fuzz(
            makers(Path(seeds), args.kinds), args.count, args.seed, lambda line: print(line, flush=True)
        )
    print(f'{sum(ended.values())} inputs, {len(findings)} findings')
    return bool(findings)


if __name__ == '__main__':
    sys.exit(main())
