"""The page under load: `make load`. A thousand requests, among them what is no image, torn or too large.

Prints how each kind was answered, and the server's memory on the way; fails at a crash, a wrong answer or a leak.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from test_explore import FLOWER, Server, bad_files, encoded

REQUESTS = int(os.environ.get('REQUESTS', '1000'))
CLIENTS = 4
SLOPE = 30  # kB a request at most in the second half; Gradio keeps a queue for each of the last 2,000 sessions


def main() -> int:
    """Run it; 0 if all went well."""
    run = Path(sys.argv[1])
    good = {
        f'{kind}.{kind}': encoded(FLOWER.resize(size), kind)
        for kind, size in (
            ('jpeg', (640, 427)),
            ('png', (300, 200)),
            ('webp', (500, 500)),
            ('gif', (64, 64)),
            ('bmp', (200, 200)),
        )
    }
    files = {**good, **bad_files()}
    with (
        tempfile.TemporaryDirectory() as folder,
        open(f'{folder}/log', 'w') as log,
        subprocess.Popen(
            [
                sys.executable,
                '-u',
                '-m',
                't2t_vit.cli',
                'explore',
                '--checkpoint',
                str(run),
                '--max_megabytes',
                '1',
                '--max_megapixels',
                '2',
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, 'TMPDIR': folder},
        ) as process,
    ):
        while not (found := re.search(r'http://\S+', Path(folder, 'log').read_text())):
            assert process.poll() is None, Path(folder, 'log').read_text()
            time.sleep(0.2)
        server, memory = Server(found[0], Path(folder)), psutil.Process(process.pid)
        resident: list[tuple[int, float]] = []
        begun = time.perf_counter()

        def ask(i: int) -> tuple[str, str]:
            """One request: which file, and how it was answered."""
            if i % max(REQUESTS // 50, 1) == 0:
                resident.append((i, memory.memory_info().rss / 1e6))
            name = list(files)[i % len(files)]
            try:
                path = server.upload(name, files[name])
                answer = path if path.isdigit() else server.look(path, run.name)
            except Exception as error:  # any client's counts as a wrong answer
                answer = repr(error)
            return name, (
                'refused'
                if answer == '413'
                else 'a sentence'
                if 'role=\\"alert\\"' in answer
                else 'an answer'
                if 'class=\\"bars\\"' in answer
                else f'wrong: {answer[:80]}'
            )

        with ThreadPoolExecutor(CLIENTS) as pool:
            ended = Counter(pool.map(ask, range(REQUESTS)))
        seconds = time.perf_counter() - begun
        alive = process.poll() is None
        left = list(Path(folder).glob('*/files/uploads/*'))
        process.terminate()
        process.wait(60)
        text = Path(folder, 'log').read_text()
    for (name, kind), count in sorted(ended.items()):
        print(f'{count:5} {name:10} {kind}')
    print('resident MB after so many requests:', ', '.join(f'{n}: {mb:.0f}' for n, mb in resident[::5]))
    print(
        f'{REQUESTS} requests by {CLIENTS} clients in {seconds:.0f} s; uploads left behind: {len(left)}; '
        f'ended by {process.returncode}; tracebacks in its log: {text.count("Traceback")}'
    )
    slope = 1000 * np.polyfit(*zip(*[at for at in resident if at[0] >= REQUESTS // 2]), 1)[0]
    print(f'in the second half: {slope:.1f} kB a request, at most {SLOPE}')
    expected = {
        name: 'an answer' if name in good else 'refused' if name == 'heavy.bmp' else 'a sentence' for name in files
    }
    fine = (
        alive
        and not left
        and sum(ended.values()) == REQUESTS
        and process.returncode == 0
        and 'Traceback' not in text
        and all(kind == expected[name] for name, kind in ended)
        and slope < SLOPE
    )
    print('all well' if fine else f'NOT WELL; its log ends with:\n{text[-5000:]}')
    return 0 if fine else 1


if __name__ == '__main__':
    sys.exit(main())
