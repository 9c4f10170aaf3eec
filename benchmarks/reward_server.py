"""Load on a reward server: connections that are lost, and how long an answer takes.

    python benchmarks/reward_server.py --clients 64 --requests 300

The server runs in a process of its own and scores by length; each client sends one request after
the other, over a new connection each, without retries.
"""

import argparse
import http.client
import json
import multiprocessing
import statistics
import threading
import time
from collections import Counter

from trl_instruct.rewards.server import RewardServer

BODY = json.dumps({"prompts": ["Name a bird."] * 8, "completions": ["An owl."] * 8})


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def serve(ports):
    """Serve until killed; put the port into the queue."""
    with RewardServer(length) as server:
        ports.put(server.server_port)
        server.serve_forever()


def load(port, requests, seconds, faults, ready):
    """Send the requests of one client; note each one's seconds, or its fault."""
    ready.wait()
    for _ in range(requests):
        start = time.perf_counter()
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/score", BODY, {"Content-Type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            assert answer == {"scores": [7.0] * 8}, answer
            connection.close()
            seconds.append(time.perf_counter() - start)
        except (OSError, http.client.HTTPException) as error:
            faults[type(error).__name__] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=300, help="of each client (%(default)s)")
    options = parser.parse_args()
    ports = multiprocessing.Queue()
    server = multiprocessing.Process(target=serve, args=(ports,), daemon=True)
    server.start()
    seconds, faults, ready = [], Counter(), threading.Barrier(options.clients)
    arguments = (ports.get(), options.requests, seconds, faults, ready)
    clients = [threading.Thread(target=load, args=arguments) for _ in range(options.clients)]
    start = time.perf_counter()
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    took = time.perf_counter() - start
    server.kill()
    at = statistics.quantiles(seconds, n=1000)
    print(
        f"{options.clients} clients x {options.requests} requests in {took:.1f} s: lost "
        f"{dict(faults) or 'none'}; p50 {at[499] * 1e3:.1f} ms, p99 {at[989] * 1e3:.0f} ms, "
        f"longest {max(seconds) * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
