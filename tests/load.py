"""The page under load: `make load`. A thousand requests, among them what is no image, torn or too large.

Prints how each kind was answered, and the server's memory on the way; fails at a crash, a wrong answer or a leak.
"""

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import List, Tuple

import psutil
from test_explore import FLOWER, Server, bad_files, encoded

REQUESTS = int(os.environ.get('REQUESTS', '1000'))
CLIENTS = 4
GROWTH = 25  # MB at most in the second half: what is left of allocators


def main() -> int:
    """Run it; 0 if all went well."""
    run = Path(sys.argv[1])
    good = {f'{kind}.{kind}': encoded(FLOWER.resize(size), kind) for kind, size in (
        ('jpeg', (640, 427)), ('png', (300, 200)), ('webp', (500, 500)), ('gif', (64, 64)), ('bmp', (200, 200)))}
    files = {**good, **bad_files()}
    with tempfile.TemporaryDirectory() as folder, open(f'{folder}/log', 'w') as log, subprocess.Popen(
            [sys.executable, '-u', '-m', 't2t_vit.cli', 'explore', '--checkpoint', str(run), '--max_megabytes', '1',
             '--max_megapixels', '2'], stdout=log, stderr=log, env={**os.environ, 'TMPDIR': folder}) as process:
        while not (found := re.search(r'http://\S+', Path(folder, 'log').read_text())):
            assert process.poll() is None, Path(folder, 'log').read_text()
            time.sleep(.2)
        server, memory = Server(found[0], Path(folder)), psutil.Process(process.pid)
        ended: Counter = Counter()
        resident: List[Tuple[int, float]] = [(0, memory.memory_info().rss / 1e6)]
        jobs = iter(range(REQUESTS))
        begun = time.perf_counter()

        wrong: List[str] = []

        def work() -> None:
            try:
                ask()
            except Exception as error:  # a thread's own would be lost
                wrong.append(f'{type(error).__name__}: {error}')

        def ask() -> None:
            for i in jobs_of():
                name = list(files)[i % len(files)]
                path = server.upload(f'{i}-{name}', files[name])
                answer = path if path.isdigit() else server.look(path, run.name)
                kind = ('refused' if answer == '413' else 'a sentence' if 'role=\\"alert\\"' in answer
                        else 'an answer' if 'class=\\"bars\\"' in answer else f'wrong: {answer[:80]}')
                ended[name, kind] += 1
                if sum(ended.values()) % (REQUESTS // 10) == 0:
                    resident.append((sum(ended.values()), memory.memory_info().rss / 1e6))

        lock = threading.Lock()

        def jobs_of():  # type: ignore[no-untyped-def]
            while True:
                with lock:
                    i = next(jobs, None)
                if i is None:
                    return
                yield i

        threads = [threading.Thread(target=work) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begun
        alive = process.poll() is None
        left = [file for file in Path(folder).rglob('*.*') if re.match(r'\d+-', file.name)]
        process.terminate()
        process.wait(60)
        text = Path(folder, 'log').read_text()
    for (name, kind), count in sorted(ended.items()):
        print(f'{count:5} {name:10} {kind}')
    print('resident MB after so many requests:', ', '.join(f'{n}: {mb:.0f}' for n, mb in resident))
    print(f'{REQUESTS} requests by {CLIENTS} clients in {seconds:.0f} s; uploads left behind: {len(left)}; '
          f'ended by {process.returncode}; tracebacks in its log: {text.count("Traceback")}')
    settled = [mb for n, mb in resident if n >= REQUESTS // 2]
    expected = {name: 'an answer' if name in good else 'refused' if name == 'heavy.bmp' else 'a sentence'
                for name in files}
    print('clients that failed:', wrong or 'none')
    fine = (alive and not wrong and not left and sum(ended.values()) == REQUESTS and process.returncode == 0
            and 'Traceback' not in text and all(kind == expected[name] for name, kind in ended)
            and settled[-1] - settled[0] < GROWTH)
    print('all well' if fine else 'NOT WELL')
    return 0 if fine else 1


if __name__ == '__main__':
    sys.exit(main())
