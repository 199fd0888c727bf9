"""Put the page under load: `make load`. A thousand requests, with files that are no image, truncated or too large.

Prints how each kind was answered and the memory of the server; fails for a crash, a wrong answer or a leak.
"""

import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from test_explore import FLOWER, Server, bad_files, encoded, start_server

REQUESTS = int(os.environ.get('REQUESTS', '1000'))
CLIENTS = 4
MAX_GROWTH = 30  # kB a request in the second half; Gradio keeps a queue for each of the last 2,000 sessions


def main() -> int:
    """Send the requests; returns 0 if all were answered rightly."""
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
    with tempfile.TemporaryDirectory() as folder:
        limits = ['--max_megabytes', '1', '--max_megapixels', '2']
        process, address = start_server(Path(folder), '--checkpoint', str(run), *limits)
        server, memory = Server(address, Path(folder)), psutil.Process(process.pid)
        resident: list[tuple[int, float]] = []
        begun = time.perf_counter()

        def ask(i: int) -> tuple[str, str]:
            """Send a file; returns its name and how it was answered."""
            if i % max(REQUESTS // 50, 1) == 0:
                resident.append((i, memory.memory_info().rss / 1e6))
            name = list(files)[i % len(files)]
            try:
                token = server.upload(name, files[name])
                answer = token if token.isdigit() else server.ask('classify', token)
            except Exception as error:  # any error of the client counts as a wrong answer
                answer = repr(error)
            kinds = {'413': 'refused', **({answer: 'a sentence'} if isinstance(answer, str) and name in answer else {})}
            found = 'an answer' if isinstance(answer, dict) and 'predictions' in answer else kinds.get(str(answer))
            return name, found or f'wrong: {str(answer)[:80]}'

        with ThreadPoolExecutor(CLIENTS) as pool:
            ended = Counter(pool.map(ask, range(REQUESTS)))
        seconds = time.perf_counter() - begun
        alive = process.poll() is None
        left = server.files()
        process.terminate()
        process.wait(60)
        text = Path(folder, 'log').read_text()
    for (name, kind), count in sorted(ended.items()):
        print(f'{count:5} {name:10} {kind}')
    print('resident MB after so many requests:', ', '.join(f'{n}: {mb:.0f}' for n, mb in resident[::5]))
    print(
        f'{REQUESTS} requests by {CLIENTS} clients in {seconds:.0f} s; uploads not deleted: {len(left)}; '
        f'ended by {process.returncode}; tracebacks in its log: {text.count("Traceback")}'
    )
    slope = 1000 * np.polyfit(*zip(*[at for at in resident if at[0] >= REQUESTS // 2]), 1)[0]
    print(f'in the second half: {slope:.1f} kB a request, at most {MAX_GROWTH}')
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
        and slope < MAX_GROWTH
    )
    print('passed' if fine else f'FAILED; the log ends with:\n{text[-5000:]}')
    return 0 if fine else 1


if __name__ == '__main__':
    sys.exit(main())
