"""JAX's coordination service as a place for keys and values, in a process of its own.

    python -m jaxtron.launch.coordination serve PORT [HOST]    until its standard input ends
    python -m jaxtron.launch.coordination join HOST:PORT       a request a line, as JSON, and an answer to each

A process of its own, for JAX's client waits for a service that is silent for as long as that is, with Python's lock
held, and ends its process where the service is gone. Whoever asks can drop it. docs/decisions/0010-rendezvous.md
"""

import json
import socket
import sys
from typing import Any

# JAX itself starts and joins it by these, as `jax.distributed` for a number of processes that is known
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

# All who join are task 0 of 1, which may come back as often as it likes: no one waits for a number of others. Who lives
# is seen from what they write, so the service itself is to miss nobody.
RECOVERABLE: dict[str, Any] = {"recoverable": True}
NEVER = 10**6
RPC_SECONDS, JOIN_SECONDS = 10, 10


def serve(port: str, host: str = "") -> None:
    """Serves at the port, on all interfaces or that of the host alone, until the standard input ends."""
    everywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    service = _jax.get_distributed_runtime_service(
        f"{host or everywhere}:{port}", 1, heartbeat_timeout=NEVER, shutdown_timeout=1, **RECOVERABLE
    )
    print("serving", flush=True)
    sys.stdin.read()
    service.shutdown()


def join(address: str) -> None:
    """Answers requests `{"set": {key: value}, "list": [prefix, ...]}` by `{prefix: {key: value}}`."""
    client = _jax.get_distributed_runtime_client(
        address,
        0,
        rpc_timeout=RPC_SECONDS,
        init_timeout=JOIN_SECONDS,
        heartbeat_timeout=NEVER,
        shutdown_on_destruction=False,
    )
    client.connect()
    print("joined", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        for key, value in request["set"].items():
            client.key_value_set(key, value, allow_overwrite=True)
        print(json.dumps({prefix: dict(client.key_value_dir_get(prefix)) for prefix in request["list"]}), flush=True)


if __name__ == "__main__":
    {"serve": serve, "join": join}[sys.argv[1]](*sys.argv[2:])
