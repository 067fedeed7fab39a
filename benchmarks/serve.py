"""What `rolldiff serve` costs: seconds beside the bare decoder, and images of many clients.

    python benchmarks/serve.py                                      a table
    python benchmarks/serve.py --out benchmarks/results/NAME.json   and a JSON file
    python benchmarks/serve.py --quick                              few steps, to try the script

The weights are random and of the size that `rolldiff train` trains for digits; the server is a
process of its own, asked over HTTP on this machine. Bare decoder and server take turns in each
round, and a figure is the median over rounds, see `engine_rounds.py`.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from engine_results import Results, bounded, machine

from rolldiff import Decoder, Training

CPU = torch.device("cpu")
TARGETS = {"overhead_ms": 10.0}
IMAGE = {"image_size": 8, "channels": 1, "patch": 2, "num_classes": 10}
NUM_GROUPS = 4


@contextmanager
def serving(*overrides: str) -> Iterator[str]:
    """`rolldiff serve` as a process, on a free port: its address."""
    command = [sys.executable, "-m", "rolldiff", "serve", "port=0", *overrides]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http\S+", server.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            yield found.group()
        finally:
            server.terminate()
            server.wait()  # before its output is closed


class Client:
    """One connection that stays open."""

    def __init__(self, url: str) -> None:
        address = url.removeprefix("http://").strip("/")
        self.connection = http.client.HTTPConnection(address, timeout=600)

    def close(self) -> None:
        self.connection.close()

    def ask(self, **body: Any) -> http.client.HTTPResponse:
        body = {"prompt": "3", "num_groups": NUM_GROUPS} | body
        headers = {"Content-Type": "application/json"}
        self.connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
        answer = self.connection.getresponse()
        if answer.status != 200:
            raise SystemExit(answer.read().decode())
        return answer

    def image(self, **body: Any) -> None:
        """Ask for an image, and wait for it."""
        json.loads(self.ask(**body).read())

    def stream(self, **body: Any) -> tuple[float, float]:
        """Seconds until the first frame was there, and until the last."""
        start = time.perf_counter()
        answer, first = self.ask(stream=True, **body), None
        for line in answer:
            if line.startswith(b"data: ") and first is None:
                first = time.perf_counter() - start
        assert first is not None
        return first, time.perf_counter() - start


def measure(steps: int, rounds: int, clients: int) -> Results:
    """All figures."""
    results = Results()
    torch.manual_seed(0)
    decoder = Decoder.build(**IMAGE, training=Training((1, 2, 4, 8, 16))).eval()
    options = {"num_groups": NUM_GROUPS, "steps": steps, "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        decoder.save_pretrained(folder)
        with serving(f"ckpt={folder}") as url, closing(Client(url)) as client:
            cases = {
                "bare": lambda: decoder.decode([3], **options),
                "served": lambda: client.image(steps=steps, seed=0),
                "nothing": lambda: _get(client, "/healthz"),
            }
            found = results.watch.time_rounds(cases, rounds, device=CPU)
            for name, seconds in found.items():
                results.put(f"{name}_ms", [1000 * s for s in seconds])
            pairs = zip(found["served"], found["bare"], strict=True)
            results.put("overhead_ms", [1000 * (a - b) for a, b in pairs])
            streams = [client.stream(steps=steps, seed=0, partial_images=4) for _ in range(rounds)]
            results.put("first_frame_ms", [1000 * first for first, _ in streams])
            results.put("first_frame_over_whole", [first / whole for first, whole in streams])
            measure_load(results, url, decoder, clients=clients, rounds=rounds, steps=steps)
    return results


def _get(client: Client, path: str) -> None:
    client.connection.request("GET", path)
    client.connection.getresponse().read()


def measure_load(
    results: Results, url: str, decoder: Decoder, *, clients: int, rounds: int, steps: int
) -> None:
    """Images per second of so many clients at once, and of the bare decoder."""
    options = {"num_groups": NUM_GROUPS, "steps": steps, "seed": 0}

    def one(i: int) -> None:
        with closing(Client(url)) as client:
            client.image(steps=steps, seed=i)

    served, alone, together = [], [], []
    for _ in range(max(1, rounds // 4)):
        with ThreadPoolExecutor(clients) as pool:
            start = time.perf_counter()
            list(pool.map(one, range(clients)))
            served.append(clients / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(clients):
            decoder.decode([3], **options)
        alone.append(clients / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(clients // 16):
            decoder.decode([3] * 16, **options)
        together.append(clients / (time.perf_counter() - start))
    results.put(f"images_per_second_{clients}_clients", served)
    results.put("images_per_second_bare_one_by_one", alone)
    results.put("images_per_second_bare_batches_of_16", together)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="a JSON file to write as well")
    parser.add_argument("--quick", action="store_true", help="few steps; the figures mean nothing")
    args = parser.parse_args()
    results = measure(2, 4, 16) if args.quick else measure(16, 40, 32)
    found = {
        **results.figures,
        "spread": results.spread,
        "rounds": {"repeated": results.watch.repeated, "noisy": results.watch.noisy},
        "machine": machine(["cpu"], torch.get_num_threads()),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(bounded(results.figures, results.spread, TARGETS))


if __name__ == "__main__":
    main()
